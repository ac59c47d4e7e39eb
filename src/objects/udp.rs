//! UDP sockets: bound and connected addresses, and the datagrams that wait. Raw and ICMP sockets, whose packets are the
//! network's and can't be sent again: of those the first that waits tells whether the program has read since.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::Error;
use super::live::Live;
use super::socket::{State, capture_queue};
use super::socket_queue::{Shape, peek};
use crate::kernel::socket::{Message, local_address, option, peer_address, receive, set_option};

/// How long a datagram may take over the loopback interface.
const DEADLINE: Duration = Duration::from_secs(2);
/// `SO_MEMINFO` (Linux 4.12), whose first number is what the receive queue takes.
const SO_MEMINFO: i32 = 55;
/// More than an IP packet has.
const LARGEST_PACKET: usize = 1 << 16;
/// More than any queue took that a program has been given.
const ROOMY: i32 = 512 << 20;

/// Records what only UDP has.
pub(super) fn capture(live: &Live<'_>, fd: BorrowedFd<'_>, state: State) -> Result<State, Error> {
    Ok(State {
        queue: match state.is_udp() {
            true => capture_queue(live, fd, Shape::Messages)?,
            false => first(fd).map_err(live.failed("recvmsg"))?,
        },
        // Who may have one is the network namespace's to say, by group.
        irreplaceable: match (state.sort.kind, state.is_udp()) {
            (libc::SOCK_DGRAM, false) => Some("it is an ICMP socket".into()),
            _ => state.irreplaceable,
        },
        ..state
    })
}

/// The first packet that waits.
fn first(fd: BorrowedFd<'_>) -> nix::Result<Vec<Message>> {
    let found = receive(fd, LARGEST_PACKET, libc::MSG_PEEK)?;
    Ok(found.into_iter().collect())
}

/// The state now.
pub(super) fn observe(live: &Live<'_>, fd: BorrowedFd<'_>, state: State) -> Result<State, Error> {
    Ok(State {
        local: local_address(fd).map_err(live.failed("getsockname"))?,
        peer: peer_address(fd)
            .map_err(live.failed("getpeername"))?
            .unwrap_or_default(),
        queue: match state.is_udp() {
            true => peek(fd, Shape::Messages),
            false => first(fd),
        }
        .map_err(live.failed("recvmsg"))?,
        ..state
    })
}

/// Makes room for any queue: what does not fit is dropped without a word. The program may have made the buffer smaller
/// since, or when the queue was full already. The caller puts the options back.
///
/// # Errors
/// As setsockopt(2).
pub(super) fn make_room(reader: BorrowedFd<'_>) -> nix::Result<()> {
    let name = libc::SO_RCVBUFFORCE;
    set_option(reader, libc::SOL_SOCKET, name, &ROOMY.to_ne_bytes())
}

/// Has a datagram sent to `reader` and waits until it is there, so that the next one comes after it.
///
/// # Errors
/// That of `send`; `ETIMEDOUT` if it does not arrive.
pub(super) fn deliver(
    reader: BorrowedFd<'_>,
    send: impl FnOnce() -> nix::Result<()>,
) -> nix::Result<()> {
    let before = queued(reader)?;
    send()?;
    let started = Instant::now();
    while queued(reader)? <= before {
        if started.elapsed() > DEADLINE {
            return Err(Errno::ETIMEDOUT);
        }
        std::thread::yield_now();
    }
    Ok(())
}

/// Bytes of memory that the receive queue takes.
fn queued(fd: BorrowedFd<'_>) -> nix::Result<u32> {
    let mut bytes = [0; 36];
    option(fd, libc::SOL_SOCKET, SO_MEMINFO, &mut bytes)?;
    let [a, b, c, d, ..] = bytes;
    Ok(u32::from_ne_bytes([a, b, c, d]))
}
