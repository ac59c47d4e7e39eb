//! Fixture programs of threads and processes: registers, signals, timers, family.
