//! UDP sockets: bound and connected addresses, and the datagrams that wait.

use std::os::fd::BorrowedFd;

use super::Error;
use super::live::Live;
use super::socket::{State, capture_queue};
use super::socket_queue::{Shape, peek};
use crate::kernel::socket::{local_address, peer_address};

/// Records what only UDP has.
pub(super) fn capture(live: &Live<'_>, fd: BorrowedFd<'_>, state: State) -> Result<State, Error> {
    Ok(State {
        queue: capture_queue(live, fd, Shape::Messages)?,
        ..state
    })
}

/// The state now.
pub(super) fn observe(live: &Live<'_>, fd: BorrowedFd<'_>, state: State) -> Result<State, Error> {
    Ok(State {
        local: local_address(fd).map_err(live.failed("getsockname"))?,
        peer: peer_address(fd)
            .map_err(live.failed("getpeername"))?
            .unwrap_or_default(),
        queue: peek(fd, Shape::Messages).map_err(live.failed("recvmsg"))?,
        ..state
    })
}
