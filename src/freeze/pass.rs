//! Passing a descriptor of ours into a stopped process, as `SCM_RIGHTS` (unix(7)).

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::Pid;

use crate::kernel::pidfd;

use super::stopped::Stopped;
use super::{Batch, Context, Error, Result};

/// `struct msghdr` on x86-64.
const MSGHDR: usize = 56;
/// `CMSG_SPACE(sizeof(int))`, and where the descriptor is in it.
const CONTROL: usize = 24;
const CONTROL_DATA: usize = 16;

impl Stopped<'_> {
    /// Gives a process a duplicate of a descriptor, close-on-exec, under a number that was free, and returns that.
    pub fn pass_descriptor(&mut self, pid: Pid, descriptor: BorrowedFd<'_>) -> Result<i32> {
        let failed = |what: &'static str| move |errno: Errno| Error::Call { pid, what, errno };
        let mut open = Batch::new();
        let pair = open.output(8);
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let made = open.call(
            libc::SYS_socketpair,
            &[libc::AF_UNIX.into(), kind.into(), 0.into(), pair.arg()],
        );
        let opened = self.run(pid, &open)?;
        opened.result(made).map_err(failed("socketpair"))?;
        let number = |at: usize| {
            opened.bytes(&pair)[at..]
                .first_chunk()
                .map_or(-1, |bytes| i32::from_ne_bytes(*bytes))
        };
        let (receive, send) = (number(0), number(4));
        let ours = pidfd::get_fd(self.member(pid)?.pidfd.as_fd(), send)
            .context(|| format!("pidfd_getfd {pid} {send}"))?;
        sendmsg::<()>(
            ours.as_raw_fd(),
            &[IoSlice::new(b"x")],
            &[ControlMessage::ScmRights(&[descriptor.as_raw_fd()])],
            MsgFlags::MSG_DONTWAIT,
            None,
        )
        .context(|| "send a descriptor".into())?;

        let mut take = Batch::new();
        let byte = take.output(8);
        let control = take.output(CONTROL);
        let iov = take.output(16);
        let header = take.output(MSGHDR);
        let one = take.input(&1u64.to_ne_bytes());
        let len = take.input(&(CONTROL as u64).to_ne_bytes());
        take.point(&iov, 0, &byte);
        take.copy(iov.at(8), one, 8);
        take.point(&header, 16, &iov);
        take.copy(header.at(24), one, 8);
        take.point(&header, 32, &control);
        take.copy(header.at(40), len, 8);
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        let received = take.call(
            libc::SYS_recvmsg,
            &[receive.into(), header.arg(), flags.into()],
        );
        for number in [receive, send] {
            take.call(libc::SYS_close, &[number.into()]);
        }
        let taken = self.run(pid, &take)?;
        taken.result(received).map_err(failed("recvmsg"))?;
        let landed = taken.bytes(&control)[CONTROL_DATA..]
            .first_chunk()
            .map(|bytes| i32::from_ne_bytes(*bytes));
        landed.filter(|number| *number >= 0).ok_or(Error::Call {
            pid,
            what: "recvmsg",
            errno: Errno::EBADMSG,
        })
    }
}
