//! Typed, safe wrappers of the kernel interface. The only room that says `unsafe`.

pub mod anonymous;
pub mod confined;
pub mod disposition;
pub mod kcmp;
pub mod keyring;
pub mod last_pid;
pub mod loopback;
pub mod maps;
pub mod memory_file;
pub mod namespaces;
pub mod pagemap;
pub mod pidfd;
pub mod probe;
pub mod proc_events;
pub mod procfs;
pub mod ptrace;
pub mod registers;
pub mod remote_memory;
pub mod runner;
pub mod scheduling;
pub mod smaps;
pub(crate) mod sock_diag;
pub mod socket;
pub mod terminal;
pub mod userfaultfd;
pub mod window;
