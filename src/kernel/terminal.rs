//! Pseudo-terminals: ioctl_tty(2), and their passing through a socket: unix(7).
#![allow(unsafe_code)]

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

/// Gives the terminal `to` the window size of the terminal `from`; `ENOTTY` if one of them is none.
pub fn copy_window_size(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel fills a winsize that outlives the call.
    Errno::result(unsafe { libc::ioctl(from.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) })?;
    // SAFETY: the kernel reads a winsize that outlives the call.
    Errno::result(unsafe { libc::ioctl(to.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
        .map(drop)
}

/// Receives one descriptor, close-on-exec, from a connected unix socket; `EBADMSG` if the message has none.
pub fn receive_descriptor(socket: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let mut name = [0; 4096];
    let mut parts = [IoSliceMut::new(&mut name)];
    let mut control = nix::cmsg_space!([libc::c_int; 1]);
    let message = recvmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = part
            && let Some(&fd) = descriptors.first()
        {
            // SAFETY: the kernel has just put this descriptor into our table; nobody else knows it. There is room
            // for one only, so none is dropped.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(Errno::EBADMSG)
}
