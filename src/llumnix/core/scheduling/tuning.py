"""The scheduler's constants: the unit of each, its effect, and the evidence for its value.

Evidence is a file below benchmarks/results that was measured with this value (and with no other to
compare it with), the paper, or the word `guess`. What a user may set is in core/settings.py. Bounds
that other rooms share are in core/limits.py.
"""

from llumnix.core.settings import PAPER_BLOCK_TOKENS

# -- dispatch: where a new request goes

PREFILL_QUANTUM_TOKENS = 512
"""Tokens. Prompts that are queued before a request are compared in steps of so many. A smaller
difference takes a decode step or two, and is no reason to go where less memory is free.
Evidence: guess."""
HOLDERS_MAX = 8
"""Instances. So many of those that have the most of a prompt in their prefix caches are looked at,
which bounds the time of a dispatch. Evidence: scheduler_prefixes.json."""
PREFILL_WEIGHT = 2
"""Tokens to wait for, for each token to compute. Higher: requests keep more to the caches, at the
price of longer queues. Evidence: gpu/shared_prefixes_4.json."""
NEIGHBOUR_TOKENS = 600
"""Tokens to wait for, for each request on the same instance. Higher: a popular prefix is spread
over more instances. Evidence: gpu/shared_prefixes_4.json."""
NEIGHBOUR_PROMPT_SHARE = 0.3
"""Share of the prompt. Adds that much to `NEIGHBOUR_TOKENS`, because requests that share a long
prefix have long contexts, and steps take longer with them. Evidence: gpu/shared_prefixes_4.json."""
HALF_WEIGHT_BATCH = 4
"""Requests. Among so many, one request more weighs half as much, and so do missing tokens of
memory, since one of many requests ends sooner than one of few. Evidence:
gpu/shared_prefixes_4.json."""

# -- pairing: which instance gives load to which

STOP_STEPS = 1.0
"""Decode steps. What a move costs its request beyond the copy: no engine computes it for about one
step. Evidence: gpu/migration_h200_now.json."""
ORDERS_MAX = 64
"""Orders. No round of pairing decides more, which bounds its time; the next round comes soon.
Evidence: scheduler_prefixes.json."""
TRIES_MAX = 4
"""Destinations. A source is tried with so many in a round, in each order of looking at them.
Higher: fewer sources go without a move, and rounds take longer. Evidence: guess."""

# -- observed: means over all instances, and thresholds that follow

HALF_LIFE_REQUESTS = 2000
"""Requests. After so many answers an older one counts half for the mean length of answers.
Evidence: guess."""
HALF_LIFE_STEPS = 500
"""Steps. The same for the mean duration of a step. Evidence: guess."""
HALF_LIFE_BYTES = 2**30
"""Bytes moved. The same for the mean time that moving a byte takes. Evidence: guess."""
ENOUGH_REQUESTS = 20
"""Requests. Before so many answers have ended, the paper's fixed thresholds hold.
Evidence: guess."""
PAPER_THRESHOLD = 3.0 * PAPER_BLOCK_TOKENS
"""Decode steps of freeness. Below it an instance gives requests away, above it one takes them, as
long as too few answers have ended. Evidence: the paper."""
PAPER_SCALE_LOW = 10.0 * PAPER_BLOCK_TOKENS
"""Decode steps of freeness. Below this mean the number of instances grows, likewise.
Evidence: the paper."""
PAPER_SCALE_HIGH = 60.0 * PAPER_BLOCK_TOKENS
"""Decode steps of freeness. Above this mean it shrinks, likewise. Evidence: the paper."""
SOURCE_SHARE = 0.125
"""Share of the mean length of an answer. An instance of lower freeness gives requests away. Higher:
moves begin earlier, and there are more of them. Evidence: gpu/serving_4.json."""
DESTINATION_SHARE = 0.5
"""Share of the mean length of an answer. An instance of higher freeness takes requests. Higher:
fewer instances may take them. Evidence: gpu/serving_4.json."""
SOURCE_MIN_STEPS = 16.0
"""Decode steps of freeness. The least threshold, however short answers are: a move takes a few
steps itself. Evidence: guess."""
SCALE_LOW_SHARE = 0.5
"""Share of the mean length of an answer. Below this mean freeness the number of instances grows.
Evidence: gpu/scaling_4.json."""
SCALE_HIGH_SHARE = 2.0
"""Share of the mean length of an answer. Above this mean freeness it shrinks.
Evidence: gpu/scaling_4.json."""

# -- scaling: how many instances there are

TARGET_RATIO = 1.25
"""Times the lower bound. A change must leave at least so much mean freeness. Higher: instances are
started in larger groups and drained later. Evidence: guess."""
RETRY_FIRST_S = 10.0
"""Seconds. Nothing is started for so long after the second instance in a row was given up, and for
twice as long after each further one. Evidence: guess."""
RETRY_MAX_S = 600.0
"""Seconds. The longest of these pauses. Evidence: guess."""
ROW_ENDS_AFTER_S = 1800.0
"""Seconds without an instance that was given up, after which the next begins a new row. It is
longer than the longest pause and a start together, else no row would outlast that pause.
Evidence: guess."""

# -- the view: how long a belief is held

BOOKING_LIFETIME_S = 5.0
"""Seconds. A dispatch that no report covers by then is taken to have never arrived.
Evidence: guess."""
BOOKINGS_MAX = 10_000
"""Dispatches on their way to one instance. The oldest lapses first; more pile up only where nothing
answers. Evidence: guess."""
ORDER_LIFETIME_S = 2.0
"""Seconds. An order that no report names by then is taken to be lost. Evidence: guess."""
FRUITLESS_S = 0.5
"""Seconds. So long two instances are not paired again after the source had nothing to move.
Evidence: guess."""
STALE_AFTER_S = 1.0
"""Seconds. An instance that was silent for longer gets requests only if all are. Engines report
every 0.1 s at least. Evidence: guess."""
DRAIN_LIFETIME_S = 5.0
"""Seconds. An instance that still accepts by then was not drained, though that was decided.
Evidence: guess."""
THRESHOLD_STEP = 0.05
"""Share of a threshold. Thresholds follow the answers in steps of this size, since sort keys depend
on them: with each change all heaps are made anew. Evidence: guess."""
USE_S = 1.0
"""Seconds. The mean use of memory that headroom follows is smoothed over so long.
Evidence: guess."""
USE_EVERY_S = 0.05
"""Seconds. It is looked at that often at most, because each look may change the headroom.
Evidence: guess."""
HEADROOM_STEP = 0.02
"""Share of an instance's memory. Headroom follows the use of memory in steps of this size, since
sort keys depend on it: with each change those of all instances are made anew. Evidence: guess."""
HEAP_ENTRIES_PER_INSTANCE = 8
"""Entries. A heap with more of them for each instance, and `HEAP_ENTRIES_MORE` beyond, is dropped
and made anew when it is next asked for. Evidence: guess."""
HEAP_ENTRIES_MORE = 64
"""Entries. See above: so that few instances do not make their heaps anew all the time.
Evidence: guess."""
