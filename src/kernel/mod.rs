//! Typed, safe wrappers of the kernel interface. The only room that says `unsafe`.

pub mod kcmp;
pub mod pidfd;
