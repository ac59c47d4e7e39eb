//! Observe, plan, execute, verify.
