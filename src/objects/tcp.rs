//! TCP sockets: listeners with their backlog, and connections by how far each side has read and written.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use super::Error;
use super::live::Live;
use super::socket::{Role, State, capture_queue};
use super::socket_diag;
use super::socket_ends::canonical;
use super::socket_queue::{Shape, peek};
use crate::kernel::sock_diag::{InetSocket, state};
use crate::kernel::socket::{local_address, option, peer_address, poll, unread, unsent};

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
    /// The program has shut down reading, of which the other end knows nothing.
    pub reading_ended: bool,
    /// The other end was of this network namespace and has been closed: all that it sent is here.
    pub peer_gone: bool,
}

impl Connection {
    /// Whether both directions are open and nothing waits at this end. Bytes that were sent have left and are the
    /// peer's; that it has not acknowledged them yet tells nothing, for it may put that off by 40 ms and more.
    pub(super) fn is_idle(&self) -> bool {
        self.state == state::ESTABLISHED && self.unread == 0 && self.not_sent == 0
    }

    /// Which directions are shut down, as `RCV_SHUTDOWN` (1) and `SEND_SHUTDOWN` (2): the peer's end shows by itself.
    pub(super) fn ended(&self) -> u8 {
        let writing = match self.state {
            state::ESTABLISHED | state::CLOSE_WAIT => 0,
            _ => 2,
        };
        writing | u8::from(self.reading_ended)
    }

    /// Whether the program has neither read nor written since `before`, nor has the state changed: whatever is under
    /// way then is what would have been under way had nothing run.
    pub(super) fn is_where(&self, before: &Self) -> bool {
        self.is_open_like(before) && (self.read, self.written) == (before.read, before.written)
    }

    /// Whether the same directions are shut down.
    pub(super) fn is_open_like(&self, before: &Self) -> bool {
        (self.phase(), self.reading_ended) == (before.phase(), before.reading_ended)
    }

    /// The state as far as the program can tell: whether its own end was acknowledged is no difference.
    pub(super) fn phase(&self) -> u8 {
        phase(self.state)
    }
}

/// `FIN_WAIT1` becomes `FIN_WAIT2` by itself; of a connection that both have ended nobody can tell who was first.
pub(super) fn phase(state: u8) -> u8 {
    match state {
        state::FIN_WAIT1 => state::FIN_WAIT2,
        state::LAST_ACK => state::CLOSING,
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
        state::CLOSE => {
            // The end of a connection can be read, and what waits before it; one that never was can't.
            let ended = poll(fd).map_err(live.failed("poll"))?.0;
            Ok(Role::Plain {
                ended: if ended { 3 } else { 0 },
            })
        }
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
            // Once the peer has ended it there is no difference.
            let may_read = matches!(
                found.state,
                state::ESTABLISHED | state::FIN_WAIT1 | state::FIN_WAIT2
            );
            return Ok(Connection {
                state: found.state,
                read: found.bytes_received.wrapping_sub(u64::from(unread)),
                written: found.bytes_acked.wrapping_add(u64::from(unsent)),
                unread,
                unsent,
                not_sent: found.not_sent,
                reading_ended: may_read && poll(fd)?.1,
                peer_gone: false,
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

/// Whether the other end of a connection that it has ended was of this namespace and belongs to nobody any more.
fn peer_is_gone(live: &Live<'_>, own: &State, now: &Connection) -> Result<bool, Error> {
    let (Some(local), Some(peer)) = (canonical(&own.local), canonical(&own.peer)) else {
        return Ok(false);
    };
    if now.state != state::CLOSE_WAIT || !(peer.ip().is_loopback() || peer.ip() == local.ip()) {
        return Ok(false);
    }
    let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    for family in [libc::AF_INET, libc::AF_INET6] {
        let all = socket_diag::inet(live.holder.pid, family, libc::IPPROTO_TCP)?;
        let is_peer = |socket: &&InetSocket| {
            (plain(socket.local), plain(socket.remote)) == (peer, local) && socket.inode != 0
        };
        if all.iter().any(|socket| is_peer(&socket)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Records what only TCP has.
pub(super) fn capture(live: &Live<'_>, fd: BorrowedFd<'_>, state: State) -> Result<State, Error> {
    Ok(match role(live, fd, &state)? {
        Role::Tcp(mut connection) => {
            connection.peer_gone = peer_is_gone(live, &state, &connection)?;
            let queue = match connection.peer_gone {
                true => capture_queue(live, fd, Shape::Stream)?,
                false => Vec::new(),
            };
            State {
                options: state.options.of_connection(state.sort),
                role: Role::Tcp(connection),
                queue,
                ..state
            }
        }
        role @ Role::Plain { ended: 1.. } => State {
            role,
            queue: capture_queue(live, fd, Shape::Stream)?,
            ..state
        },
        role => State { role, ..state },
    })
}

/// The state now. An idle connection costs three calls.
pub(super) fn observe(live: &Live<'_>, fd: BorrowedFd<'_>, state: State) -> Result<State, Error> {
    let role = role(live, fd, &state)?;
    if let (Role::Tcp(_), Role::Tcp(before)) = (&role, &state.role) {
        let queue = match before.peer_gone {
            true => peek(fd, Shape::Stream).map_err(live.failed("recvmsg"))?,
            false => Vec::new(),
        };
        // Neither address of a connection can change.
        return Ok(State {
            role,
            options: state.options.of_connection(state.sort),
            queue,
            ..state
        });
    }
    let queue = match role {
        Role::Plain { ended: 1.. } => peek(fd, Shape::Stream).map_err(live.failed("recvmsg"))?,
        _ => Vec::new(),
    };
    Ok(State {
        local: local_address(fd).map_err(live.failed("getsockname"))?,
        peer: peer_address(fd)
            .map_err(live.failed("getpeername"))?
            .unwrap_or_default(),
        role,
        queue,
        ..state
    })
}
