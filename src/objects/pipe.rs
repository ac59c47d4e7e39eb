//! Pipes and FIFOs: one object behind the descriptions of its ends.
//!
//! A pipe is *internal* if nobody outside the tree has an end of it: its content goes back. One with an end outside
//! (the standard output that a supervisor reads) is *external*: it is kept and its content left alone.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice, tee};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Pid, pipe2};
use serde::{Deserialize, Serialize};

use super::Error;
use super::model::Place;
use crate::kernel::anonymous::readable_bytes;
use crate::kernel::procfs;

/// An end of a pipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The path of a FIFO; `None` for a pipe.
    pub fifo: Option<String>,
}

/// A pipe or FIFO.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    /// `st_dev` and `st_ino` of its ends.
    pub inode: (u64, u64),
    /// `F_GETPIPE_SZ`, bytes.
    pub capacity: usize,
    /// What is in it, for an internal pipe; `None` for an external one.
    pub content: Option<Content>,
}

/// Bytes a pipe's buffer has, which is the longest packet too.
const PAGE: usize = 4096;

/// The content of a pipe.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Content {
    /// All bytes.
    pub bytes: Vec<u8>,
    /// Lengths of the packets with which it begins, if it was written in packet mode (`O_DIRECT`).
    pub packets: Vec<usize>,
}

fn own(call: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Own { call, errno }
}

fn io(call: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::Own {
        call,
        errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
    }
}

/// `F_GETPIPE_SZ` in bytes.
pub fn capacity(end: impl AsFd) -> Result<usize, Error> {
    fcntl(end.as_fd().as_raw_fd(), FcntlArg::F_GETPIPE_SZ)
        .map(|size| size as usize)
        .map_err(own("F_GETPIPE_SZ"))
}

/// `F_SETPIPE_SZ`; the kernel rounds up to a power of two of pages.
pub fn set_capacity(end: impl AsFd, bytes: usize) -> Result<(), Error> {
    fcntl(
        end.as_fd().as_raw_fd(),
        FcntlArg::F_SETPIPE_SZ(bytes as i32),
    )
    .map(drop)
    .map_err(own("F_SETPIPE_SZ"))
}

/// Whether nobody has the other end of this one open (`POLLHUP` of a reading, `POLLERR` of a writing end).
pub fn is_abandoned(end: impl AsFd) -> Result<bool, Error> {
    let fd = end.as_fd();
    let mut fds = [PollFd::new(fd, PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).map_err(own("poll"))?;
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
    Ok(fds[0]
        .revents()
        .is_some_and(|events| events.intersects(gone)))
}

fn scratch(capacity: usize, flags: OFlag) -> Result<(OwnedFd, OwnedFd), Error> {
    let (read, write) =
        pipe2(flags | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(own("pipe2"))?;
    set_capacity(&write, capacity)?;
    Ok((read, write))
}

/// Reads what is in a pipe without removing it, through a reading end.
pub fn content(end: impl AsFd) -> Result<Content, Error> {
    let expected = readable_bytes(&end).map_err(own("FIONREAD"))?;
    if expected == 0 {
        return Ok(Content::default());
    }
    let capacity = capacity(&end)?;
    // Room for a marker too, of which a single packet must leave some.
    let (read, write) = scratch(capacity.max(2 * PAGE), OFlag::empty())?;
    tee(
        &end,
        &write,
        usize::MAX >> 1,
        SpliceFFlags::SPLICE_F_NONBLOCK,
    )
    .map_err(own("tee"))?;
    let content = read_all(read.into(), write.into(), expected)?;
    if content.bytes.len() == expected {
        Ok(content)
    } else {
        Err(own("tee")(Errno::EIO))
    }
}

/// Reads what is in a pipe of ours. A read that ends before the buffer is full ends at a packet's end. Whether the last one
/// is a packet tells a marker behind it, which a read takes as well if not. When there is no room for the marker at first,
/// there is either more than one packet, or none.
fn read_all(mut pipe: File, mut end: File, expected: usize) -> Result<Content, Error> {
    let mut content = Content {
        bytes: vec![0; expected + 2],
        packets: Vec::new(),
    };
    let mut done = 0;
    let mut marked = false;
    while done < expected {
        marked = marked || end.write(b"!").is_ok();
        let got = pipe.read(&mut content.bytes[done..]).map_err(io("read"))?;
        if got == 0 {
            break;
        }
        content.packets.push(got.min(expected - done));
        done += got;
    }
    if done > expected || !marked {
        // The last one was none.
        content.packets.pop();
    }
    content.bytes.truncate(done.min(expected));
    Ok(content)
}

/// Empties a pipe through a reading end.
pub fn drain(end: impl AsFd) -> Result<(), Error> {
    let capacity = capacity(&end)?;
    while readable_bytes(&end).map_err(own("FIONREAD"))? > 0 {
        let (_read, write) = scratch(capacity, OFlag::empty())?;
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
        match splice(&end, None, &write, None, usize::MAX >> 1, flags) {
            Ok(0) | Err(Errno::EAGAIN) => break,
            Ok(_) => {}
            Err(errno) => return Err(own("splice")(errno)),
        }
    }
    Ok(())
}

/// Writes into an empty pipe through a writing end.
pub fn fill(end: impl AsFd, content: &Content) -> Result<(), Error> {
    if content.bytes.is_empty() {
        return Ok(());
    }
    let (read, write) = scratch(capacity(&end)?, OFlag::O_DIRECT)?;
    let mut write = File::from(write);
    let mut rest = &content.bytes[..];
    for &len in &content.packets {
        let (packet, after) = rest
            .split_at_checked(len)
            .ok_or_else(|| own("packets")(Errno::EINVAL))?;
        write.write_all(packet).map_err(io("write"))?;
        rest = after;
    }
    fcntl(write.as_raw_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(own("F_SETFL"))?;
    write.write_all(rest).map_err(io("write"))?;
    let mut left = content.bytes.len();
    while left > 0 {
        match splice(
            &read,
            None,
            &end,
            None,
            left,
            SpliceFFlags::SPLICE_F_NONBLOCK,
        ) {
            Ok(0) => return Err(own("splice")(Errno::EIO)),
            Ok(moved) => left -= moved,
            Err(errno) => return Err(own("splice")(errno)),
        }
    }
    Ok(())
}

/// Opens another description of a pipe or FIFO through a path in `/proc` (or of the FIFO), without waiting for the other
/// end: for writing, a reading end is held meanwhile, without which there would be `ENXIO`.
pub fn open(path: &str, access: i32) -> Result<OwnedFd, Error> {
    let open = |access| {
        OpenOptions::new()
            .read(access != libc::O_WRONLY)
            .write(access != libc::O_RDONLY)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map(OwnedFd::from)
            .map_err(|error| Error::Text {
                path: path.to_owned(),
                problem: format!("open: {error}"),
            })
    };
    let _reader = if access == libc::O_WRONLY {
        Some(open(libc::O_RDONLY)?)
    } else {
        None
    };
    open(access)
}

/// Opens a pipe through a descriptor that a process has of it; through another if that process has ended meanwhile or has
/// closed it.
pub fn open_through(place: Place, inode: (u64, u64), access: i32) -> Result<OwnedFd, Error> {
    const ATTEMPTS: usize = 16;
    let mut place = Some(place);
    for _ in 0..ATTEMPTS {
        let Some(Place { pid, fd }) = place else {
            break;
        };
        if let Ok(end) = open(&format!("/proc/{pid}/fd/{fd}"), access) {
            let end = File::from(end);
            let at = end.metadata().map_err(io("fstat"))?;
            if (at.dev(), at.ino()) == inode {
                return Ok(end.into());
            }
        }
        place = outside_holder(inode, |_| false)?;
    }
    Err(own("open")(Errno::ENOENT))
}

/// A place outside the tree where a pipe is open, if there is one; looks at every process.
pub fn outside_holder(
    inode: (u64, u64),
    but: impl Fn(i32) -> bool,
) -> Result<Option<Place>, Error> {
    let text = |error: std::io::Error| Error::Text {
        path: "/proc".into(),
        problem: error.to_string(),
    };
    let ourselves = std::process::id() as i32;
    // The oldest, as the others may be children of it that are about to execute something, and will have it no more.
    let mut oldest: Option<(u64, Place)> = None;
    for process in std::fs::read_dir("/proc").map_err(text)? {
        let name = process.map_err(text)?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // It may end meanwhile, or not be ours to look at.
        let Ok(numbers) = super::survey::numbers(pid) else {
            continue;
        };
        let is_it = |fd: &i32| {
            std::fs::metadata(format!("/proc/{pid}/fd/{fd}"))
                .is_ok_and(|at| (at.dev(), at.ino()) == inode)
        };
        if let Some(fd) = numbers.into_iter().find(is_it)
            && pid != ourselves
            && !but(pid)
        {
            let stat = procfs::Stat::read(Pid::from_raw(pid));
            let since = stat.map_or(u64::MAX, |stat| stat.start_time());
            if oldest.is_none_or(|(age, _)| since < age) {
                oldest = Some((since, Place { pid, fd }));
            }
        }
    }
    Ok(oldest.map(|(_, place)| place))
}

/// A new pipe like it, with its content: the reading and the writing end.
pub fn make(pipe: &Pipe) -> Result<(OwnedFd, OwnedFd), Error> {
    let ends = scratch(pipe.capacity, OFlag::empty())?;
    if let Some(content) = &pipe.content {
        fill(&ends.1, content)?;
    }
    Ok(ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(flags: OFlag) -> (OwnedFd, OwnedFd) {
        pipe2(flags | OFlag::O_CLOEXEC).unwrap()
    }

    #[test]
    fn looking_removes_nothing_and_refilling_gives_the_same() {
        let (read, write) = pair(OFlag::empty());
        let bytes: Vec<u8> = (0..60_000u32).map(|i| (i % 251) as u8).collect();
        let mut file = File::from(write.try_clone().unwrap());
        file.write_all(&bytes).unwrap();
        let seen = content(&read).unwrap();
        assert_eq!(seen.bytes, bytes);
        assert_eq!(content(&read).unwrap(), seen);
        drain(&read).unwrap();
        assert_eq!(content(&read).unwrap(), Content::default());
        file.write_all(b"other").unwrap();
        drain(&read).unwrap();
        fill(&write, &seen).unwrap();
        assert_eq!(content(&read).unwrap().bytes, bytes);
    }

    #[test]
    fn packets_stay_apart() {
        let (read, write) = pair(OFlag::O_DIRECT);
        let mut file = File::from(write.try_clone().unwrap());
        for packet in [&b"one"[..], b"three", b""] {
            file.write_all(packet).unwrap();
        }
        let seen = content(&read).unwrap();
        assert_eq!(seen.packets, [3, 5]);
        drain(&read).unwrap();
        fill(&write, &seen).unwrap();
        assert_eq!(content(&read).unwrap(), seen);
        let mut buffer = [0; 100];
        assert_eq!(File::from(read).read(&mut buffer).unwrap(), 3);
    }

    #[test]
    fn a_single_packet_is_one() {
        for (flags, packets) in [(OFlag::O_DIRECT, vec![5]), (OFlag::empty(), vec![])] {
            let (read, write) = pair(flags);
            set_capacity(&read, PAGE).unwrap();
            File::from(write.try_clone().unwrap())
                .write_all(b"three")
                .unwrap();
            let seen = content(&read).unwrap();
            assert_eq!((&seen.bytes[..], &seen.packets), (&b"three"[..], &packets));
            drain(&read).unwrap();
            fill(&write, &seen).unwrap();
            assert_eq!(content(&read).unwrap(), seen);
        }
    }

    #[test]
    fn an_end_without_another_is_abandoned() {
        let (read, write) = pair(OFlag::empty());
        assert!(!is_abandoned(&read).unwrap());
        drop(write);
        assert!(is_abandoned(&read).unwrap());
        let (read, write) = pair(OFlag::empty());
        drop(read);
        assert!(is_abandoned(&write).unwrap());
    }
}
