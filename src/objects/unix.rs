//! Unix sockets: names, peers, listeners with their backlog, and what waits to be read.

use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::Error;
use super::live::Live;
use super::socket::{Role, State, capture_queue};
use super::socket_diag;
use super::socket_queue::peek;
use crate::kernel::sock_diag::{UnixSocket, state};
use crate::kernel::socket::{Address, Credentials, local_address, option, peer_address, poll};

/// The file a socket is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundFile {
    /// Inode number.
    pub inode: u64,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What the kernel reports about a live socket.
fn report(live: &Live<'_>, inode: u64) -> Result<UnixSocket, Error> {
    socket_diag::unix(live.holder.pid, inode)?.ok_or(Error::Own {
        call: "sock_diag",
        errno: Errno::ENOENT,
    })
}

/// `SO_PEERCRED`.
fn peer_credentials(fd: BorrowedFd<'_>) -> nix::Result<Credentials> {
    let mut bytes = [0u8; 12];
    option(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, &mut bytes)?;
    let word = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
    Ok(Credentials {
        pid: i32::from_ne_bytes(word(0)),
        uid: u32::from_ne_bytes(word(4)),
        gid: u32::from_ne_bytes(word(8)),
    })
}

/// Where a path of the holder's is for us.
pub(super) fn path_for_us(pid: i32, path: &[u8]) -> PathBuf {
    let path = Path::new(OsStr::from_bytes(path));
    match path.strip_prefix("/") {
        Ok(below) => PathBuf::from(format!("/proc/{pid}/root")).join(below),
        Err(_) => PathBuf::from(format!("/proc/{pid}/cwd")).join(path),
    }
}

/// The file at a path of the holder's, if it is a socket.
pub(super) fn file_at(pid: i32, address: &Address) -> Option<BoundFile> {
    let found = std::fs::symlink_metadata(path_for_us(pid, address.unix_path()?)).ok()?;
    (found.mode() & libc::S_IFMT == libc::S_IFSOCK).then(|| BoundFile {
        inode: found.ino(),
        mode: found.mode() & 0o7777,
        uid: found.uid(),
        gid: found.gid(),
    })
}

/// The role as the kernel reports it.
fn role(found: &UnixSocket) -> Role {
    if found.state == state::LISTEN {
        let mut waiting: Vec<u64> = found
            .pending
            .iter()
            .map(|&inode| u64::from(inode))
            .collect();
        waiting.sort_unstable();
        return Role::Listening {
            backlog: found.send_queue,
            waiting,
        };
    }
    match found.peer {
        Some(peer) => Role::Unix {
            peer: u64::from(peer),
            ended: found.shutdown,
        },
        None => Role::Plain {
            ended: found.shutdown,
        },
    }
}

/// Records what only unix sockets have.
pub(super) fn capture(live: &Live<'_>, fd: BorrowedFd<'_>, state: State) -> Result<State, Error> {
    let found = report(live, state.inode)?;
    let role = role(&found);
    // Of a connection that was accepted this is the listener's file, which belongs to that.
    let file = file_at(live.holder.pid, &state.local).filter(|file| {
        found
            .file
            .is_some_and(|(inode, _)| file.inode as u32 == inode)
    });
    let queue = match role {
        Role::Listening { .. } => Vec::new(),
        _ => capture_queue(live, fd, state.shape())?,
    };
    // The kernel does not tell in which directory a name was looked up.
    let relative = state.local.unix_path().is_some_and(|path| path[0] != b'/');
    let is_named = !matches!(role, Role::Unix { .. }) || state.sort.kind == libc::SOCK_DGRAM;
    let irreplaceable = match found.file.is_some() && file.is_none() && relative && is_named {
        true => Some("its name does not lead to its file any more".into()),
        false => state.irreplaceable,
    };
    let credentials = Some(peer_credentials(fd).map_err(live.failed("getsockopt"))?);
    Ok(State {
        file,
        role,
        queue,
        irreplaceable,
        credentials,
        ..state
    })
}

/// The state now: one report, and a look at the queue if something waits in it.
///
/// A quiet connection with both ends in the tree needs no report: it can't get another peer, and what is shut down at
/// one end shows at the other.
pub(super) fn observe(live: &Live<'_>, fd: BorrowedFd<'_>, now: State) -> Result<State, Error> {
    let (readable, ended) = poll(fd).map_err(live.failed("poll"))?;
    let local = local_address(fd).map_err(live.failed("getsockname"))?;
    if now.inner && !readable && !ended {
        return Ok(State { local, ..now });
    }
    let role = role(&report(live, now.inode)?);
    let queue = match role {
        Role::Listening { .. } => Vec::new(),
        _ if !readable => Vec::new(),
        _ => peek(fd, now.shape()).map_err(live.failed("recvmsg"))?,
    };
    if now.sort.kind != libc::SOCK_DGRAM && matches!(now.role, Role::Unix { .. }) {
        // The peer's name is its own affair.
        return Ok(State {
            local,
            role,
            queue,
            ..now
        });
    }
    Ok(State {
        local,
        peer: peer_address(fd)
            .map_err(live.failed("getpeername"))?
            .unwrap_or_default(),
        role,
        queue,
        ..now
    })
}
