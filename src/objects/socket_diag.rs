//! One sock_diag(7) client per network namespace, for as long as an operation looks at sockets.

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;

use super::Error;
use crate::kernel::sock_diag::SockDiag;

thread_local! {
    /// By inode of the namespace. A namespace lives while a client of it is open, so [`close`] ends that.
    static CLIENTS: RefCell<HashMap<u64, SockDiag>> = RefCell::new(HashMap::new());
}

/// Asks the kernel about the sockets of a process's network namespace.
///
/// # Errors
/// If the namespace can't be entered, or as `ask`.
pub(super) fn ask<T>(
    pid: i32,
    ask: impl FnOnce(&mut SockDiag) -> nix::Result<T>,
) -> Result<T, Error> {
    let failed = |errno| Error::Own {
        call: "sock_diag",
        errno,
    };
    let namespace = std::fs::metadata(format!("/proc/{pid}/ns/net"))
        .map_err(|error| failed(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))))?
        .ino();
    CLIENTS.with_borrow_mut(|clients| {
        use std::collections::hash_map::Entry;
        let client = match clients.entry(namespace) {
            Entry::Occupied(client) => client.into_mut(),
            Entry::Vacant(slot) => slot.insert(SockDiag::open_of(pid).map_err(failed)?),
        };
        ask(client).map_err(failed)
    })
}

/// Closes the clients. The end of every pass over sockets.
pub(super) fn close() {
    CLIENTS.with_borrow_mut(HashMap::clear);
}
