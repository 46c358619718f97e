"""Pool and executor: who gets which task, who runs it, and who hears of it."""
