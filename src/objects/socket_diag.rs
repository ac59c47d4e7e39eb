//! One sock_diag(7) client per network namespace, for as long as an operation looks at sockets.

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;

use nix::errno::Errno;

use super::Error;
use crate::kernel::sock_diag::{InetSocket, SockDiag, UnixSocket};

/// Internet sockets by process, family and protocol.
type Lists = HashMap<(i32, i32, i32), Rc<Vec<InetSocket>>>;

thread_local! {
    /// By inode of the namespace. A namespace lives while a client of it is open, so [`close`] ends that.
    static CLIENTS: RefCell<HashMap<u64, SockDiag>> = RefCell::new(HashMap::new());
    /// What they told in this pass.
    static LISTS: RefCell<Lists> = RefCell::new(Lists::new());
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

/// What the kernel reports about a unix socket of a process; `None` if it knows of none with this inode.
///
/// A socket that was accepted lives in the network namespace of the one that connected: a client on the host makes the
/// container's socket one of the host's namespace, which is ours.
///
/// # Errors
/// As [`ask`].
pub(super) fn unix(pid: i32, inode: u64) -> Result<Option<UnixSocket>, Error> {
    for of in [pid, std::process::id() as i32] {
        let found = ask(of, |diag| match diag.unix_socket(inode as u32) {
            Err(Errno::ENOENT) => Ok(None),
            other => other.map(Some),
        })?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// All internet sockets of a kind in a process's network namespace, as they were when first asked for in this pass.
///
/// # Errors
/// As [`ask`].
pub(super) fn inet(pid: i32, family: i32, protocol: i32) -> Result<Rc<Vec<InetSocket>>, Error> {
    let key = (pid, family, protocol);
    if let Some(known) = LISTS.with_borrow(|lists| lists.get(&key).cloned()) {
        return Ok(known);
    }
    let list = Rc::new(ask(pid, |diag| diag.inet(family, protocol))?);
    LISTS.with_borrow_mut(|lists| lists.insert(key, list.clone()));
    Ok(list)
}

/// Closes the clients and forgets what they told. The end of every pass over sockets.
pub(super) fn close() {
    CLIENTS.with_borrow_mut(HashMap::clear);
    LISTS.with_borrow_mut(HashMap::clear);
    super::socket_extra::close();
}
