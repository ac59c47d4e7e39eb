//! TCP sockets: listeners with their backlog, and connections by how far each side has read and written.

use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use super::Error;
use super::live::Live;
use super::socket::{Role, State};
use super::socket_diag;
use crate::kernel::sock_diag::{InetSocket, state};
use crate::kernel::socket::{local_address, option, peer_address, unread, unsent};

/// A TCP connection as the program at this end sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// State of `net/tcp_states.h`.
    pub state: u8,
    /// Bytes the program has read since the connection began (up to a constant).
    pub read: u64,
    /// Bytes the program has written since the connection began (up to a constant).
    pub written: u64,
    /// Bytes that wait to be read.
    pub unread: u32,
    /// Bytes not acknowledged by the peer.
    pub unsent: u32,
    /// Of those, bytes that have not been sent at all.
    pub not_sent: u32,
}

impl Connection {
    /// Whether both directions are open and nothing waits at this end. Bytes that were sent have left and are the
    /// peer's; that it has not acknowledged them yet tells nothing, for it may put that off by 40 ms and more.
    pub(super) fn is_idle(&self) -> bool {
        self.state == state::ESTABLISHED && self.unread == 0 && self.not_sent == 0
    }

    /// Which directions are shut down, as `RCV_SHUTDOWN` (1) and `SEND_SHUTDOWN` (2): the peer's end shows by itself.
    pub(super) fn ended(&self) -> u8 {
        match self.state {
            state::ESTABLISHED | state::CLOSE_WAIT => 0,
            _ => 2,
        }
    }

    /// Whether the program has neither read nor written since `before`, nor has the state changed: whatever is under
    /// way then is what would have been under way had nothing run.
    pub(super) fn is_where(&self, before: &Self) -> bool {
        (self.phase(), self.read, self.written) == (before.phase(), before.read, before.written)
    }

    /// The state as far as the program can tell: whether its own end was acknowledged is no difference.
    pub(super) fn phase(&self) -> u8 {
        phase(self.state)
    }
}

/// `FIN_WAIT1` becomes `FIN_WAIT2` by itself.
pub(super) fn phase(state: u8) -> u8 {
    match state {
        state::FIN_WAIT1 => state::FIN_WAIT2,
        other => other,
    }
}

/// What is used of `struct tcp_info` (tcp(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Info {
    pub(super) state: u8,
    /// Of a listener: connections that wait.
    pub(super) unacked: u32,
    /// Of a listener: the greatest number that may wait.
    pub(super) sacked: u32,
    bytes_acked: u64,
    bytes_received: u64,
    /// Bytes that were not sent at all so far.
    pub(super) not_sent: u32,
}

/// Reads `TCP_INFO`, whose layout only ever grew at its end.
pub(super) fn info(fd: BorrowedFd<'_>) -> nix::Result<Info> {
    let mut bytes = [0u8; 152];
    option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut bytes)?;
    let u32_at =
        |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    Ok(Info {
        state: bytes[0],
        unacked: u32_at(24),
        sacked: u32_at(28),
        bytes_acked: u64_at(120),
        bytes_received: u64_at(128),
        not_sent: u32_at(144),
    })
}

/// What a TCP socket is used for now.
fn role(live: &Live<'_>, fd: BorrowedFd<'_>, own: &State) -> Result<Role, Error> {
    let found = info(fd).map_err(live.failed("getsockopt"))?;
    match found.state {
        state::LISTEN => {
            let waiting = match found.unacked {
                0 => Vec::new(),
                _ => waiting(live, own)?
                    .iter()
                    .map(|socket| socket.cookie)
                    .collect(),
            };
            Ok(Role::Listening {
                backlog: found.sacked,
                waiting,
            })
        }
        state::CLOSE => Ok(Role::Plain { ended: 0 }),
        _ => connection(fd)
            .map(Role::Tcp)
            .map_err(live.failed("getsockopt")),
    }
}

/// Reads counters until they agree: packets arrive also while the program is stopped.
fn connection(fd: BorrowedFd<'_>) -> nix::Result<Connection> {
    loop {
        let (unread_before, unsent_before) = (unread(fd)?, unsent(fd)?);
        let found = info(fd)?;
        let (unread, unsent) = (unread(fd)?, unsent(fd)?);
        if (unread, unsent) == (unread_before, unsent_before) {
            return Ok(Connection {
                state: found.state,
                read: found.bytes_received.wrapping_sub(u64::from(unread)),
                written: found.bytes_acked.wrapping_add(u64::from(unsent)),
                unread,
                unsent,
                not_sent: found.not_sent,
            });
        }
    }
}

/// The connections that wait to be accepted by a listener, by cookie: established, with its port, and without inode.
pub(super) fn waiting(live: &Live<'_>, listener: &State) -> Result<Vec<InetSocket>, Error> {
    let Some(local) = listener.local.inet() else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    // An IPv6 listener may accept IPv4 connections as well.
    for family in [libc::AF_INET, libc::AF_INET6] {
        let all = socket_diag::ask(live.holder.pid, |diag| diag.inet(family, libc::IPPROTO_TCP))?;
        found.extend(all.into_iter().filter(|socket| {
            let ours = local.ip().is_unspecified()
                || socket.local.ip().to_canonical() == local.ip().to_canonical();
            socket.inode == 0
                && matches!(socket.state, state::ESTABLISHED | state::CLOSE_WAIT)
                && socket.local.port() == local.port()
                && ours
        }));
    }
    found.sort_by_key(|socket| socket.cookie);
    Ok(found)
}

/// Records what only TCP has.
pub(super) fn capture(live: &Live<'_>, fd: BorrowedFd<'_>, state: State) -> Result<State, Error> {
    let role = role(live, fd, &state)?;
    Ok(match role {
        Role::Tcp(_) => State {
            options: state.options.of_connection(state.sort),
            role,
            ..state
        },
        _ => State { role, ..state },
    })
}

/// The state now. An idle connection costs three calls.
pub(super) fn observe(live: &Live<'_>, fd: BorrowedFd<'_>, state: State) -> Result<State, Error> {
    let role = role(live, fd, &state)?;
    if matches!(role, Role::Tcp(_)) && matches!(state.role, Role::Tcp(_)) {
        // Neither address of a connection can change.
        return Ok(State {
            role,
            options: state.options.of_connection(state.sort),
            ..state
        });
    }
    Ok(State {
        local: local_address(fd).map_err(live.failed("getsockname"))?,
        peer: peer_address(fd)
            .map_err(live.failed("getpeername"))?
            .unwrap_or_default(),
        role,
        ..state
    })
}
