//! Typed, safe wrappers of the kernel interface. The only room that says `unsafe`.

pub mod confined;
pub mod disposition;
pub mod kcmp;
pub mod keyring;
pub mod loopback;
pub mod memory_file;
pub mod pidfd;
pub(crate) mod sock_diag;
pub(crate) mod socket;
pub mod terminal;
