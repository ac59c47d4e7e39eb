//! Per-thread and per-process state: registers, signals, timers, credentials.
