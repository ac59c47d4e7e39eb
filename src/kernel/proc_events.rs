//! Process events connector (`linux/cn_proc.h`, `CONFIG_PROC_EVENTS`): the kernel tells of every process that is made
//! and of every one that ends, on the whole machine.
//!
//! A birth is queued before the child runs for the first time, so the queue is in causal order: what a process did
//! comes after its birth. Linux 6.6 can leave kinds of events out (`struct proc_input`); that is not asked for, because
//! only a listener that gets all of them sees by their sequence numbers that one was lost: the kernel drops an event
//! that it has no memory for without telling anybody.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::socket::{MsgFlags, NetlinkAddr, bind, send, setsockopt, sockopt::RcvBufForce};
use nix::unistd::{Pid, gettid};

/// Of `linux/netlink.h` and `linux/connector.h`.
const NLMSG_DONE: u16 = 3;
const CN_IDX_PROC: u32 = 1;
const CN_VAL_PROC: u32 = 1;
/// `PROC_CN_MCAST_LISTEN`.
const LISTEN: u32 = 1;
/// `PROC_EVENT_FORK`, `_COMM`, `_EXIT`.
const FORK: u32 = 0x0000_0001;
const COMM: u32 = 0x0000_0200;
const EXIT: u32 = 0x8000_0000;
/// `struct nlmsghdr`, `struct cn_msg` and the head of `struct proc_event`.
const NLMSG_HEADER: usize = 16;
const CN_HEADER: usize = 20;
const EVENT_HEADER: usize = 16;
/// Inode of the initial PID namespace (`PROC_PID_INIT_INO` of `linux/proc_ns.h`).
const INITIAL_PID_NAMESPACE: u64 = 0xefff_fffc;

/// Messages taken by one call, and room for one: a message has 76 bytes.
const AT_ONCE: usize = 64;
const ROOM: usize = 128;
/// About as many are taken by [`ProcEvents::receive`].
const MOST: usize = 4096;

/// What the kernel has told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A process was made. Threads are left out.
    Born {
        /// Its parent: the one it was made by, but with `CLONE_PARENT` the parent of that.
        parent: Pid,
        /// Its PID.
        child: Pid,
    },
    /// The first thread of a process has ended, and as a rule the process with it.
    Ended(Pid),
}

/// Events are missing: from now on nothing is known for certain, and the listener is to be opened anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// More were queued than the buffer holds (`ENOBUFS`, netlink(7)).
    #[error("process events did not fit into the buffer")]
    Overflow,
    /// A sequence number is missing.
    #[error("the kernel has dropped a process event")]
    Gap,
    /// An event that must be there is not.
    #[error("the kernel has ceased to tell process events")]
    Silence,
    /// recvmmsg(2) failed, or a message is not of the known form.
    #[error("process events can't be read: {0}")]
    Unreadable(Errno),
}

/// A listener.
#[derive(Debug)]
pub struct ProcEvents {
    socket: OwnedFd,
    /// The last sequence number of each processor.
    sequences: BTreeMap<u32, u32>,
}

impl ProcEvents {
    /// Begins to listen, with a buffer of so many bytes (the kernel doubles it, socket(7)).
    ///
    /// # Errors
    ///
    /// It lacks `CAP_NET_ADMIN`, or the kernel has no connector or does not tell us: it tells listeners of the initial PID
    /// and network namespaces only, and says nothing to others.
    pub fn open(buffer: usize) -> io::Result<Self> {
        if std::fs::metadata("/proc/self/ns/pid")?.ino() != INITIAL_PID_NAMESPACE {
            return Err(io::Error::other("not in the initial PID namespace"));
        }
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: takes three integers.
        let socket = Errno::result(unsafe {
            libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_CONNECTOR)
        })?;
        // SAFETY: the kernel has just returned this descriptor; nobody else knows it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        setsockopt(&socket, RcvBufForce, &buffer)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, CN_IDX_PROC))?;
        send(socket.as_raw_fd(), &listen_request(), MsgFlags::empty())?;
        let mut opened = Self {
            socket,
            sequences: BTreeMap::new(),
        };
        opened
            .receive_until_now(&mut Vec::new())
            .map_err(io::Error::other)?;
        Ok(opened)
    }

    /// Appends the events that are queued, some thousands at most, and returns how many there were, of any kind. Does
    /// not wait.
    ///
    /// # Errors
    ///
    /// [`Lost`]; what came before the loss has been appended.
    pub fn receive(&mut self, events: &mut Vec<Event>) -> Result<usize, Lost> {
        self.receive_all(events, |_, count| count >= MOST)
    }

    /// As [`ProcEvents::receive`], and makes sure that nothing is missing of what has happened before the call: gives the
    /// calling thread the name it has, which is an event too, and looks for that.
    ///
    /// # Errors
    ///
    /// As [`ProcEvents::receive`], and if our own event is not there.
    pub fn receive_until_now(&mut self, events: &mut Vec<Event>) -> Result<usize, Lost> {
        let own = gettid();
        prctl::get_name()
            .and_then(|name| prctl::set_name(&name))
            .map_err(Lost::Unreadable)?;
        let mut seen = false;
        let count = self.receive_all(events, |renamed, _| {
            seen |= renamed == Some(own);
            seen
        })?;
        if seen { Ok(count) } else { Err(Lost::Silence) }
    }

    /// The socket, to be polled.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Makes room for a few events only and causes more than that.
    #[cfg(test)]
    pub(crate) fn overflow(&self) {
        setsockopt(&self.socket, RcvBufForce, &1).expect("a small buffer");
        let name = prctl::get_name().expect("a name");
        (0..64).for_each(|_| prctl::set_name(&name).expect("an event"));
    }

    /// Until the queue is empty or, as more may come all the time, `is_enough`: told of each message whom it renames, and
    /// how many there were before those taken with it.
    fn receive_all(
        &mut self,
        events: &mut Vec<Event>,
        mut is_enough: impl FnMut(Option<Pid>, usize) -> bool,
    ) -> Result<usize, Lost> {
        let mut messages = [[0; ROOM]; AT_ONCE];
        let mut count = 0;
        loop {
            let lens = match receive_some(self.socket.as_fd(), &mut messages) {
                Ok(lens) => lens,
                Err(Errno::EAGAIN) => return Ok(count),
                Err(Errno::EINTR) => continue,
                Err(Errno::ENOBUFS) => return Err(Lost::Overflow),
                Err(errno) => return Err(Lost::Unreadable(errno)),
            };
            let mut enough = false;
            for (message, len) in messages.iter().zip(&lens) {
                let Some(len) = *len else { continue };
                let message = Message::parse(message.get(..len).unwrap_or_default())
                    .ok_or(Lost::Unreadable(Errno::EBADMSG))?;
                let last = self.sequences.insert(message.processor, message.sequence);
                if last.is_some_and(|last| last.wrapping_add(1) != message.sequence) {
                    return Err(Lost::Gap);
                }
                let renamed = match message.what {
                    What::Event(event) => {
                        events.push(event);
                        None
                    }
                    What::Renamed(tid) => Some(tid),
                    What::Other => None,
                };
                enough |= is_enough(renamed, count);
            }
            count += lens.len();
            // Fewer than asked for: the queue was empty.
            if enough || lens.len() < AT_ONCE {
                return Ok(count);
            }
        }
    }
}

/// Takes up to [`AT_ONCE`] messages; their lengths, `None` for one that is not from the kernel.
fn receive_some(
    socket: BorrowedFd<'_>,
    messages: &mut [[u8; ROOM]; AT_ONCE],
) -> nix::Result<Vec<Option<usize>>> {
    // SAFETY: these are plain C structures of integers and pointers, for which zero is a value.
    let (mut parts, mut senders, mut headers) = unsafe {
        (
            zeroed::<[libc::iovec; AT_ONCE]>(),
            zeroed::<[libc::sockaddr_nl; AT_ONCE]>(),
            zeroed::<[libc::mmsghdr; AT_ONCE]>(),
        )
    };
    for (at, message) in messages.iter_mut().enumerate() {
        parts[at].iov_base = message.as_mut_ptr().cast();
        parts[at].iov_len = ROOM;
        let header = &mut headers[at].msg_hdr;
        header.msg_iov = &raw mut parts[at];
        header.msg_iovlen = 1;
        header.msg_name = (&raw mut senders[at]).cast();
        header.msg_namelen = size_of::<libc::sockaddr_nl>() as u32;
    }
    // SAFETY: every header points to one part and one address, every part to one message of that length; all of them
    // outlive the call.
    let count = Errno::result(unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            AT_ONCE as u32,
            libc::MSG_DONTWAIT,
            std::ptr::null_mut(),
        )
    })?;
    let received = headers.iter().zip(&senders).take(count as usize);
    Ok(received
        .map(|(header, sender)| (sender.nl_pid == 0).then_some(header.msg_len as usize))
        .collect())
}

fn listen_request() -> Vec<u8> {
    let len = NLMSG_HEADER + CN_HEADER + size_of::<u32>();
    let mut request = Vec::with_capacity(len);
    request.extend((len as u32).to_ne_bytes());
    request.extend(NLMSG_DONE.to_ne_bytes());
    request.extend([0; 10]); // flags, sequence, port
    request.extend(CN_IDX_PROC.to_ne_bytes());
    request.extend(CN_VAL_PROC.to_ne_bytes());
    request.extend([0; 8]); // sequence, acknowledgement
    request.extend((size_of::<u32>() as u16).to_ne_bytes());
    request.extend([0; 2]); // flags
    request.extend(LISTEN.to_ne_bytes());
    request
}

#[derive(Debug, PartialEq, Eq)]
struct Message {
    processor: u32,
    sequence: u32,
    what: What,
}

#[derive(Debug, PartialEq, Eq)]
enum What {
    Event(Event),
    Renamed(Pid),
    Other,
}

impl Message {
    /// `None`: it is none of the connector's.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let connector = bytes.get(NLMSG_HEADER..)?;
        if (word(connector, 0)?, word(connector, 4)?) != (CN_IDX_PROC, CN_VAL_PROC) {
            return None;
        }
        let event = connector.get(CN_HEADER..)?;
        let pid = |at| word(event, EVENT_HEADER + at).map(|pid| Pid::from_raw(pid as i32));
        let what = match word(event, 0)? {
            FORK => {
                // parent_pid, parent_tgid, child_pid, child_tgid
                let (parent, thread, child) = (pid(4)?, pid(8)?, pid(12)?);
                if thread == child {
                    What::Event(Event::Born { parent, child })
                } else {
                    What::Other
                }
            }
            // process_pid, process_tgid
            EXIT if pid(0)? == pid(4)? => What::Event(Event::Ended(pid(0)?)),
            COMM => What::Renamed(pid(0)?),
            _ => What::Other,
        };
        Some(Self {
            processor: word(event, 4)?,
            sequence: word(connector, 8)?,
            what,
        })
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
#[path = "proc_events_tests.rs"]
mod tests;
