from llumnix.cli import main

raise SystemExit(main())
