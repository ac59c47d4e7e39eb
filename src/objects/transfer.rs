//! Passing descriptors of ours into a table of the tree, as `SCM_RIGHTS` (unix(7)).

use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::Error;
use super::live::Holder;
use crate::freeze::{Batch, Output, Outputs, StepId};

/// The socket pair that descriptors come through, while it is being made in the target.
#[derive(Debug)]
pub struct Passage {
    made: StepId,
    numbers: Output,
}

impl Passage {
    /// Adds the step that makes it.
    pub fn open(batch: &mut Batch) -> Self {
        let numbers = batch.output(8);
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let made = batch.call(
            libc::SYS_socketpair,
            &[libc::AF_UNIX.into(), kind.into(), 0.into(), numbers.arg()],
        );
        batch.must_succeed(made);
        Self { made, numbers }
    }

    /// Sends descriptors, one message each, into the pair that has been made in this process.
    pub fn send(
        &self,
        outputs: &Outputs,
        holder: &Holder,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Landing, Error> {
        outputs
            .result(self.made)
            .map_err(|errno| Error::Descriptor {
                what: "file table".into(),
                pid: holder.pid,
                call: "socketpair",
                errno,
            })?;
        let bytes = outputs.bytes(&self.numbers);
        let number = |at: usize| {
            bytes[at..]
                .first_chunk()
                .map_or(-1, |bytes| i32::from_ne_bytes(*bytes))
        };
        let landing = Landing {
            receive: number(0),
            send: number(4),
        };
        let socket: OwnedFd = holder.duplicate(landing.send)?;
        for descriptor in descriptors {
            let rights = [descriptor.as_raw_fd()];
            sendmsg::<()>(
                socket.as_raw_fd(),
                &[IoSlice::new(b"x")],
                &[ControlMessage::ScmRights(&rights)],
                MsgFlags::MSG_DONTWAIT,
                None,
            )
            .map_err(|errno| Error::Own {
                call: "sendmsg",
                errno,
            })?;
        }
        Ok(landing)
    }
}

/// How many descriptors may wait in a socket at once: `net.unix.max_dgram_qlen` is 10 where nobody changed it.
pub const AT_ONCE: usize = 10;

/// Where descriptors wait to be received: numbers of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Landing {
    receive: i32,
    send: i32,
}

/// `struct msghdr` on x86-64.
const MSGHDR: usize = 56;
/// `CMSG_SPACE(sizeof(int))`, and where the descriptor is in it.
const CONTROL: usize = 24;
const CONTROL_DATA: usize = 16;

/// Steps [`Landing::receive`] adds.
pub const STEPS_TO_RECEIVE: usize = 8;
/// Bytes of data it needs.
pub const DATA_TO_RECEIVE: usize = 256;

impl Landing {
    /// Adds the steps that receive the next descriptor at a certain number, which must be free.
    pub fn receive(&self, batch: &mut Batch, number: i32) {
        let byte = batch.output(8);
        let control = batch.output(CONTROL);
        let iov = batch.output(16);
        let header = batch.output(MSGHDR);
        let one = batch.input(&1u64.to_ne_bytes());
        let len = batch.input(&(CONTROL as u64).to_ne_bytes());
        batch.point(&iov, 0, &byte);
        batch.copy(iov.at(8), one, 8);
        batch.point(&header, 16, &iov);
        batch.copy(header.at(24), one, 8);
        batch.point(&header, 32, &control);
        batch.copy(header.at(40), len, 8);
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        let received = batch.call(
            libc::SYS_recvmsg,
            &[self.receive.into(), header.arg(), flags.into()],
        );
        batch.must_succeed(received);
        let landed = control.stored(CONTROL_DATA);
        let moved = batch.call(
            libc::SYS_dup3,
            &[landed, number.into(), libc::O_CLOEXEC.into()],
        );
        batch.must_succeed(moved);
        let closed = batch.call(libc::SYS_close, &[landed]);
        batch.must_succeed(closed);
    }

    /// Adds the steps that close the pair.
    pub fn close(&self, batch: &mut Batch) {
        for number in [self.receive, self.send] {
            let closed = batch.call(libc::SYS_close, &[number.into()]);
            batch.must_succeed(closed);
        }
    }
}

/// An error for the step of a batch that failed in a process.
pub fn failed(pid: i32, step: usize, errno: Errno) -> Error {
    Error::Descriptor {
        what: format!("step {step} of a batch"),
        pid,
        call: "changing the file table",
        errno,
    }
}
