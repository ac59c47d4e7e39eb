//! Terminals through a descriptor: ioctl_tty(2). A pseudo-terminal's master answers for its slave where there is a choice.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

type Result<T> = std::result::Result<T, Errno>;

/// `struct termios2` (`TCGETS2`): modes, line discipline, control characters and speeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct Termios {
    /// Input modes.
    pub input: u32,
    /// Output modes.
    pub output: u32,
    /// Control modes.
    pub control: u32,
    /// Local modes.
    pub local: u32,
    /// Line discipline, as far as it is set by this call.
    pub line: u8,
    /// Control characters; 0 is none.
    pub characters: [u8; 19],
    /// Input speed.
    pub input_speed: u32,
    /// Output speed.
    pub output_speed: u32,
}
const _: () = assert!(size_of::<Termios>() == 44);

/// Rows, columns, and pixels both ways.
pub type WindowSize = [u16; 4];

const TCGETS2: libc::Ioctl = nix::request_code_read!(b'T', 0x2a, size_of::<Termios>());
const TCSETS2: libc::Ioctl = nix::request_code_write!(b'T', 0x2b, size_of::<Termios>());
const TIOCGDEV: libc::Ioctl = nix::request_code_read!(b'T', 0x32, size_of::<u32>());
const TIOCGPKT: libc::Ioctl = nix::request_code_read!(b'T', 0x38, size_of::<i32>());
const TIOCGPTLCK: libc::Ioctl = nix::request_code_read!(b'T', 0x39, size_of::<i32>());
const TIOCGEXCL: libc::Ioctl = nix::request_code_read!(b'T', 0x40, size_of::<i32>());
const TIOCSPTLCK: libc::Ioctl = nix::request_code_write!(b'T', 0x31, size_of::<i32>());

/// What of a terminal is on or off, or a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    /// Packet mode (`TIOCPKT`), of a master.
    Packets,
    /// The lock that keeps a slave from being opened (`TIOCSPTLCK`), of a master.
    Locked,
    /// Whether it can't be opened again (`TIOCEXCL`).
    Exclusive,
    /// The line discipline (`TIOCSETD`).
    Discipline,
}

fn get<T: Copy>(fd: impl AsFd, request: libc::Ioctl, mut value: T) -> Result<T> {
    // SAFETY: every caller gives a type of the size that the request writes, and it outlives the call.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &raw mut value) })?;
    Ok(value)
}

fn set<T>(fd: impl AsFd, request: libc::Ioctl, value: &T) -> Result<()> {
    // SAFETY: every caller gives a type of the size that the request reads, and it outlives the call.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, std::ptr::from_ref(value)) };
    Errno::result(result).map(drop)
}

/// The modes.
pub fn termios(fd: impl AsFd) -> Result<Termios> {
    let empty = Termios {
        input: 0,
        output: 0,
        control: 0,
        local: 0,
        line: 0,
        characters: [0; 19],
        input_speed: 0,
        output_speed: 0,
    };
    get(fd, TCGETS2, empty)
}

/// Sets the modes at once.
pub fn set_termios(fd: impl AsFd, termios: &Termios) -> Result<()> {
    set(fd, TCSETS2, termios)
}

/// The window size.
pub fn window_size(fd: impl AsFd) -> Result<WindowSize> {
    get(fd, libc::TIOCGWINSZ, [0u16; 4])
}

/// Sets the window size; the foreground group is told if it is another (`SIGWINCH`).
pub fn set_window_size(fd: impl AsFd, size: &WindowSize) -> Result<()> {
    set(fd, libc::TIOCSWINSZ, size)
}

/// The device number of the terminal, of a master that of its slave, as `st_rdev` has it.
pub fn device(fd: impl AsFd) -> Result<u64> {
    get(fd, TIOCGDEV, 0u32).map(u64::from)
}

/// How a switch stands; `ENOTTY` if the descriptor has none.
pub fn switch(fd: impl AsFd, which: Switch) -> Result<i32> {
    let request = match which {
        Switch::Packets => TIOCGPKT,
        Switch::Locked => TIOCGPTLCK,
        Switch::Exclusive => TIOCGEXCL,
        Switch::Discipline => libc::TIOCGETD,
    };
    get(fd, request, 0i32)
}

/// Sets a switch.
pub fn set_switch(fd: impl AsFd, which: Switch, value: i32) -> Result<()> {
    match which {
        Switch::Packets => set(fd, libc::TIOCPKT, &value),
        Switch::Locked => set(fd, TIOCSPTLCK, &value),
        Switch::Exclusive if value == 0 => set(fd, libc::TIOCNXCL, &0i32),
        Switch::Exclusive => set(fd, libc::TIOCEXCL, &0i32),
        Switch::Discipline => set(fd, libc::TIOCSETD, &value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_master_answers_for_its_slave() {
        let pair = nix::pty::openpty(None, None).unwrap();
        assert_eq!(device(&pair.master), device(&pair.slave));
        let mut modes = termios(&pair.slave).unwrap();
        modes.local &= !libc::ECHO;
        set_termios(&pair.master, &modes).unwrap();
        assert_eq!(termios(&pair.slave), Ok(modes));
        set_window_size(&pair.slave, &[3, 4, 5, 6]).unwrap();
        assert_eq!(window_size(&pair.master), Ok([3, 4, 5, 6]));
        for which in [Switch::Packets, Switch::Exclusive] {
            set_switch(&pair.master, which, 1).unwrap();
            assert_eq!(switch(&pair.master, which), Ok(1));
            set_switch(&pair.master, which, 0).unwrap();
            assert_eq!(switch(&pair.master, which), Ok(0));
        }
        assert_eq!(switch(&pair.slave, Switch::Packets), Err(Errno::ENOTTY));
    }
}
