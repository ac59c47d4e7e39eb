//! The capture phases.
