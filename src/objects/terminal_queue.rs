//! What waits to be read at the two ends of a pseudo-terminal: taking it and putting it back.
//!
//! No interface looks at it without taking it, and half a line of a canonical terminal shows only when the mode is switched.
//! A terminal's input is worked on by the kernel some moments after it was written; poll(2) of a terminal with nothing to
//! read waits for that.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::Error;
use crate::kernel::anonymous::readable_bytes;
use crate::kernel::tty::{Switch, Termios, set_switch, set_termios, switch, termios};

/// What waits at both ends.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Content {
    /// Of a canonical terminal: lines, each with its end; an end of file is a line that has none.
    pub lines: Vec<Vec<u8>>,
    /// To the slave: half a line, or all of a terminal that is not canonical.
    pub rest: Vec<u8>,
    /// To the master.
    pub output: Vec<u8>,
}

impl Content {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Bytes that `FIONREAD` shows at the slave of a terminal in this mode.
    pub fn shown(&self, canonical: bool) -> usize {
        let lines: usize = self.lines.iter().map(Vec::len).sum();
        lines + if canonical { 0 } else { self.rest.len() }
    }
}

/// How long the kernel may take to pass on what was written.
const DEADLINE: Duration = Duration::from_secs(2);
/// More than a line has (`N_TTY_BUF_SIZE`).
const LINE: usize = 4096;
/// `c_cc`: the end of file, and how much a read waits for, and how long.
const VEOF: usize = libc::VEOF;
const VMIN: usize = libc::VMIN;
const VTIME: usize = libc::VTIME;

fn own(call: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Own { call, errno }
}

fn io(call: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| own(call)(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
}

/// Whether this can be done with a terminal now.
pub(super) fn can(fd: BorrowedFd<'_>, what: PollFlags) -> Result<bool, Error> {
    let mut fds = [PollFd::new(fd, what)];
    poll(&mut fds, PollTimeout::ZERO).map_err(own("poll"))?;
    Ok(fds[0].revents().is_some_and(|events| events.contains(what)))
}

/// Whether its input comes in lines.
pub(super) fn is_canonical(modes: &Termios) -> bool {
    modes.local & libc::ICANON != 0
}

/// Both ends of a pseudo-terminal, for a moment; flags of theirs are not touched.
#[derive(Debug)]
pub(super) struct Ends {
    /// The master.
    pub(super) master: File,
    /// The slave.
    pub(super) slave: File,
}

impl Ends {
    /// Takes all that waits.
    pub(super) fn take(&self) -> Result<Content, Error> {
        let packets = self.leave_packet_mode()?;
        let modes = termios(&self.slave).map_err(own("TCGETS2"))?;
        let mut content = Content::default();
        if is_canonical(&modes) {
            while can(self.slave.as_fd(), PollFlags::POLLIN)? {
                let mut line = vec![0; LINE];
                let length = (&self.slave).read(&mut line).map_err(io("read"))?;
                line.truncate(length);
                content.lines.push(line);
            }
        }
        let mut plain = modes;
        plain.local &= !libc::ICANON;
        plain.characters[VMIN] = 0;
        plain.characters[VTIME] = 0;
        set_termios(&self.slave, &plain).map_err(own("TCSETS2"))?;
        let rest = read_all(&self.slave);
        set_termios(&self.slave, &modes).map_err(own("TCSETS2"))?;
        content.rest = rest?;
        content.output = read_all(&self.master)?;
        self.set_packet_mode(packets)?;
        Ok(content)
    }

    /// Puts back what was taken. The modes are afterwards as before.
    pub(super) fn put(&self, content: &Content, canonical: bool) -> Result<(), Error> {
        if content.is_empty() {
            return Ok(());
        }
        let packets = self.leave_packet_mode()?;
        let modes = termios(&self.slave).map_err(own("TCGETS2"))?;
        let mut filling = Termios {
            input: 0,
            output: 0,
            local: if canonical { libc::ICANON } else { 0 },
            characters: [0; 19],
            ..modes
        };
        filling.characters[VMIN] = u8::from(!canonical);
        if canonical {
            filling.characters[VEOF] = unused(content);
        }
        set_termios(&self.slave, &filling).map_err(own("TCSETS2"))?;
        let put = self.fill(content, canonical, filling.characters[VEOF], &modes);
        set_termios(&self.slave, &modes).map_err(own("TCSETS2"))?;
        put?;
        self.set_packet_mode(packets)
    }

    fn fill(
        &self,
        content: &Content,
        canonical: bool,
        end: u8,
        modes: &Termios,
    ) -> Result<(), Error> {
        let mut input = Vec::new();
        for line in &content.lines {
            input.extend_from_slice(line);
            if !ends_by_itself(line, modes) {
                input.push(end);
            }
        }
        input.extend_from_slice(&content.rest);
        write_all(&self.master, &input)?;
        wait_for(&self.slave, content.shown(canonical))?;
        if canonical && !content.rest.is_empty() {
            // What is no line yet does not show.
            can(self.slave.as_fd(), PollFlags::POLLIN)?;
            if !content.lines.is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        write_all(&self.slave, &content.output)?;
        wait_for(&self.master, content.output.len())
    }

    fn leave_packet_mode(&self) -> Result<i32, Error> {
        let packets = switch(&self.master, Switch::Packets).map_err(own("TIOCGPKT"))?;
        if packets != 0 {
            set_switch(&self.master, Switch::Packets, 0).map_err(own("TIOCPKT"))?;
        }
        Ok(packets)
    }

    fn set_packet_mode(&self, packets: i32) -> Result<(), Error> {
        if packets == 0 {
            return Ok(());
        }
        set_switch(&self.master, Switch::Packets, packets).map_err(own("TIOCPKT"))
    }
}

/// Whether a line has an end of its own: a newline, or one of the characters that a program has made one.
fn ends_by_itself(line: &[u8], modes: &Termios) -> bool {
    let ends = [modes.characters[libc::VEOL], modes.characters[libc::VEOL2]];
    // While filling there are no such characters: those lines are ended by hand too, and keep their last byte.
    line.last()
        .is_some_and(|last| *last == b'\n' && !ends.contains(last))
}

/// A byte that is not in the content, and no newline, to end lines with.
fn unused(content: &Content) -> u8 {
    let is_used = |byte: &u8| {
        content.rest.contains(byte) || content.lines.iter().any(|line| line.contains(byte))
    };
    let mut free = (1..=u8::MAX).filter(|byte| *byte != b'\n' && !is_used(byte));
    free.next().unwrap_or(0)
}

fn read_all(mut end: &File) -> Result<Vec<u8>, Error> {
    let mut all = Vec::new();
    while can(end.as_fd(), PollFlags::POLLIN)? && readable_bytes(end).map_err(own("FIONREAD"))? > 0
    {
        let mut piece = vec![0; LINE];
        let length = end.read(&mut piece).map_err(io("read"))?;
        if length == 0 {
            break;
        }
        all.extend_from_slice(&piece[..length]);
    }
    Ok(all)
}

fn write_all(mut end: &File, mut bytes: &[u8]) -> Result<(), Error> {
    let started = Instant::now();
    while !bytes.is_empty() {
        if !can(end.as_fd(), PollFlags::POLLOUT)? {
            if started.elapsed() > DEADLINE {
                return Err(own("write")(Errno::EAGAIN));
            }
            std::thread::yield_now();
            continue;
        }
        let piece = &bytes[..bytes.len().min(256)];
        let length = end.write(piece).map_err(io("write"))?;
        bytes = &bytes[length..];
    }
    Ok(())
}

fn wait_for(end: &File, bytes: usize) -> Result<(), Error> {
    let started = Instant::now();
    while readable_bytes(end).map_err(own("FIONREAD"))? < bytes {
        if started.elapsed() > DEADLINE {
            return Err(own("writing to a terminal")(Errno::ETIMEDOUT));
        }
        can(end.as_fd(), PollFlags::POLLIN)?;
        std::thread::yield_now();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(change: impl Fn(&mut Termios)) -> Ends {
        let pair = nix::pty::openpty(None, None).unwrap();
        let mut modes = termios(&pair.slave).unwrap();
        modes.local &= !libc::ECHO;
        change(&mut modes);
        set_termios(&pair.slave, &modes).unwrap();
        Ends {
            master: pair.master.into(),
            slave: pair.slave.into(),
        }
    }

    fn write(mut end: &File, text: &[u8]) {
        end.write_all(text).unwrap();
    }

    #[test]
    fn lines_go_back_as_lines() {
        let ends = ends(|modes| modes.characters[libc::VEOL] = b';');
        write(&ends.master, b"one\ntwo\x04\x04th;\x16\x03x\nhal");
        write(&ends.slave, b"out\n");
        wait_for(&ends.slave, 13).unwrap();
        std::thread::sleep(Duration::from_millis(10));
        for _ in 0..2 {
            let content = ends.take().unwrap();
            let lines: [&[u8]; 5] = [b"one\n", b"two", b"", b"th;", b"\x03x\n"];
            assert_eq!(content.lines, lines);
            assert_eq!(content.rest, b"hal");
            assert_eq!(content.output, b"out\r\n");
            assert!(ends.take().unwrap().is_empty());
            ends.put(&content, true).unwrap();
        }
    }

    #[test]
    fn what_a_raw_terminal_has_goes_back() {
        let ends = ends(|modes| {
            modes.local = 0;
            modes.input = 0;
            modes.output = 0;
            modes.characters[VMIN] = 9;
        });
        set_switch(&ends.master, Switch::Packets, 1).unwrap();
        write(&ends.master, b"a\x03\n\x04");
        write(&ends.slave, b"text\n");
        let modes = termios(&ends.slave).unwrap();
        wait_for(&ends.slave, 4).unwrap();
        for _ in 0..2 {
            let content = ends.take().unwrap();
            assert_eq!(content.rest, b"a\x03\n\x04");
            assert_eq!(content.output, b"text\n");
            ends.put(&content, false).unwrap();
            assert_eq!(termios(&ends.slave), Ok(modes));
            assert_eq!(switch(&ends.master, Switch::Packets), Ok(1));
        }
    }
}
