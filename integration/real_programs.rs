//! Real programs, rolled back under load and checked by their own state.
