"""How long answers become, and what each running request may still take until its slice ends."""
