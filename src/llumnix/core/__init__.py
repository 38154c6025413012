"""The vocabulary: ids, knobs, reports, facts and decisions, messages; and the rooms that use it."""
