//! TCP sockets: listeners with their backlog, and connections by how far each side has read and written.

use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use super::Error;
use super::live::Live;
use super::socket::{Role, State};
use super::socket_diag;
use super::socket_queue::{Shape, acknowledge, peek};
use crate::kernel::sock_diag::{InetSocket, state};
use crate::kernel::socket::{
    Address, Message, bind, connect, local_address, option, peer_address, receive, set_option,
    unread, unsent,
};

/// Of `linux/tcp.h`.
const TCP_NO_QUEUE: u32 = 0;
const TCP_RECV_QUEUE: u32 = 1;
const TCP_SEND_QUEUE: i32 = 2;
/// Leaves repair mode without a window probe.
const TCP_REPAIR_OFF_NO_WP: i32 = -1;

/// A TCP connection as the program at this end sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
}

impl Connection {
    /// Whether both directions are open and nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.state == state::ESTABLISHED && self.unread == 0 && self.unsent == 0
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
        (self.state, self.read, self.written) == (before.state, before.read, before.written)
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

/// Bytes that wait at this end to be read.
pub(super) fn waits(state: &State) -> u32 {
    match &state.role {
        Role::Tcp(connection) => connection.unread,
        _ => 0,
    }
}

/// Bytes that this end has sent and the other has not acknowledged.
pub(super) fn on_the_way(state: &State) -> u32 {
    match &state.role {
        Role::Tcp(connection) => connection.unsent,
        _ => 0,
    }
}

/// What `reader` will still get from `writer`, both being ends of one connection inside: its receive queue, and what
/// does not fit into its window and waits at the writer.
pub(super) fn between(reader: BorrowedFd<'_>, writer: BorrowedFd<'_>) -> nix::Result<Vec<Message>> {
    acknowledge(reader)?;
    let mut data = Vec::new();
    for message in peek(reader, Shape::Stream)? {
        data.extend(message.data);
    }
    let pending = unsent(writer)? as usize;
    if pending > 0 {
        data.extend(unsent_bytes(writer, pending)?);
    }
    let message = Message {
        data,
        ..Message::default()
    };
    Ok(if message.data.is_empty() {
        Vec::new()
    } else {
        vec![message]
    })
}

/// Looks into the send queue, which only `TCP_REPAIR` shows (Linux 3.5).
fn unsent_bytes(writer: BorrowedFd<'_>, length: usize) -> nix::Result<Vec<u8>> {
    let set =
        |name: i32, value: i32| set_option(writer, libc::IPPROTO_TCP, name, &value.to_ne_bytes());
    set(libc::TCP_REPAIR, 1)?;
    let seen = set(libc::TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)
        .and_then(|()| receive(writer, length, libc::MSG_PEEK))
        .map(|message| message.unwrap_or_default().data);
    // Without a window probe, which would be a packet more than the program sent.
    set(libc::TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)?;
    seen
}

/// `struct tcp_repair_opt` kinds of `linux/tcp.h`, which are those of the protocol.
const TCPOPT_MSS: u32 = 2;
const TCPOPT_WINDOW: u32 = 3;
const TCPOPT_SACK_PERMITTED: u32 = 4;
/// Of the loopback interface: its MTU without the headers of IPv6.
const LOOPBACK_MSS: u32 = 65_476;
const WINDOW_SCALE: u32 = 7;
const FIRST_WINDOW: u32 = 65_535;

/// Connects two new sockets to each other, each bound to its address, without sending anything: both are told where in
/// the stream the other is.
pub(super) fn join(
    one: BorrowedFd<'_>,
    one_local: &Address,
    one_peer: &Address,
    two: BorrowedFd<'_>,
    two_local: &Address,
    two_peer: &Address,
) -> nix::Result<()> {
    const SEQUENCES: [u32; 2] = [0x1000_0000, 0x2000_0000];
    let ends = [(one, one_local, one_peer), (two, two_local, two_peer)];
    for (index, (fd, local, _)) in ends.into_iter().enumerate() {
        let number =
            |name: i32, value: u32| set_option(fd, libc::IPPROTO_TCP, name, &value.to_ne_bytes());
        number(libc::TCP_REPAIR, 1)?;
        number(libc::TCP_REPAIR_QUEUE, TCP_SEND_QUEUE as u32)?;
        number(libc::TCP_QUEUE_SEQ, SEQUENCES[index])?;
        number(libc::TCP_REPAIR_QUEUE, TCP_RECV_QUEUE)?;
        number(libc::TCP_QUEUE_SEQ, SEQUENCES[1 - index])?;
        number(libc::TCP_REPAIR_QUEUE, TCP_NO_QUEUE)?;
        bind(fd, local)?;
    }
    for (index, (fd, _, peer)) in ends.into_iter().enumerate() {
        let words = |words: &[u32]| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_ne_bytes()).collect()
        };
        connect(fd, peer)?;
        let options = words(&[
            TCPOPT_MSS,
            LOOPBACK_MSS,
            TCPOPT_WINDOW,
            WINDOW_SCALE | WINDOW_SCALE << 16,
            TCPOPT_SACK_PERMITTED,
            0,
        ]);
        set_option(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR_OPTIONS, &options)?;
        // struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
        let their_sequence = SEQUENCES[1 - index];
        let window = words(&[
            their_sequence,
            FIRST_WINDOW,
            FIRST_WINDOW,
            FIRST_WINDOW,
            their_sequence,
        ]);
        set_option(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR_WINDOW, &window)?;
    }
    for (fd, ..) in ends {
        set_option(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            &TCP_REPAIR_OFF_NO_WP.to_ne_bytes(),
        )?;
    }
    Ok(())
}
