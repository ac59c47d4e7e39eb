//! Listens for births while the tree runs, so that a process is known whose parent has ended before the next stop.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Once};
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;

use crate::kernel::pidfd;
use crate::kernel::proc_events::{Event, Lost, ProcEvents};

use super::discover;
use super::lineage::Lineage;

/// Room for some 80,000 events; memory is used by those only that are queued.
const BUFFER: usize = 32 << 20;
/// How long events may queue up before they are taken, in milliseconds: a busy machine would mean a wake-up for each.
const REST: u8 = 20;
/// Having taken so many in one go it does not rest.
const MANY: usize = 4096;

/// The descendants of a root, kept up to date by a thread that ends with this.
#[derive(Debug)]
pub(super) struct Watch {
    listening: Option<Listening>,
    losses: u64,
}

impl Watch {
    /// Begins to listen. `None`, and a warning the first time, where process events can't be had: processes are known
    /// by their parents only then.
    pub(super) fn start(root: Pid) -> Option<Self> {
        let listening = Listening::start(|| discover::descendants(root))
            .inspect_err(warn_once)
            .ok()?;
        Some(Self {
            listening: Some(listening),
            losses: 0,
        })
    }

    /// How often events were lost. Processes that left their parents before the last loss may have been missed.
    pub(super) fn losses(&self) -> u64 {
        self.losses
    }

    /// Takes note of all births up to now. After a loss nothing is known but what [`Watch::set`] tells.
    pub(super) fn catch_up(&mut self) {
        let Some(listening) = &self.listening else {
            return;
        };
        let Err(lost) = listening.followed.lock().follow(Extent::Now) else {
            return;
        };
        tracing::warn!("{lost}: processes that have left their parents may have been missed");
        self.losses += 1;
        self.listening = None;
        self.listening = Listening::start(BTreeSet::new).inspect_err(warn_once).ok();
    }

    /// Whether a PID is known as that of a descendant.
    pub(super) fn knows(&self, pid: Pid) -> bool {
        self.listening
            .as_ref()
            .is_some_and(|listening| listening.followed.lock().lineage.contains(pid))
    }

    /// A process of the tree has been born to another than the tree.
    pub(super) fn add(&mut self, pid: Pid) {
        // What its birth tells comes first.
        self.catch_up();
        if let Some(listening) = &self.listening {
            listening.followed.lock().lineage.add(pid);
        }
    }

    /// Descendants that are not among these.
    pub(super) fn others(&self, found: &BTreeSet<Pid>) -> Vec<Pid> {
        let Some(listening) = &self.listening else {
            return Vec::new();
        };
        let followed = listening.followed.lock();
        let pids = followed.lineage.pids();
        pids.filter(|pid| !found.contains(pid)).collect()
    }

    /// These are all descendants, and all of them are stopped.
    pub(super) fn set(&self, pids: impl Iterator<Item = Pid>) {
        if let Some(listening) = &self.listening {
            listening.followed.lock().lineage.set(pids);
        }
    }

    /// Makes it lose events.
    #[cfg(test)]
    pub(super) fn overflow(&self) {
        let listening = self.listening.as_ref().expect("process events");
        listening.followed.lock().listener.overflow();
    }
}

fn warn_once(error: &io::Error) {
    static WARNED: Once = Once::new();
    WARNED.call_once(|| {
        tracing::warn!(
            "no process events ({error}): processes that leave their parents are not found"
        );
    });
}

/// How far to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// What is queued.
    Queued,
    /// What has happened before the call, for certain.
    Now,
}

/// What the listener has told.
#[derive(Debug)]
struct Followed {
    listener: ProcEvents,
    lineage: Lineage,
    /// Empty; kept for its memory.
    events: Vec<Event>,
    lost: Option<Lost>,
}

impl Followed {
    /// Returns how many events there were.
    fn follow(&mut self, extent: Extent) -> Result<usize, Lost> {
        if let Some(lost) = self.lost {
            return Err(lost);
        }
        let received = match extent {
            Extent::Queued => self.listener.receive(&mut self.events),
            Extent::Now => self.listener.receive_until_now(&mut self.events),
        };
        for event in self.events.drain(..) {
            self.lineage.note(event);
        }
        self.lost = received.err();
        self.lineage.forget_ended(is_process);
        received
    }
}

/// Whether there is a process of this number. The number of one that has ended may be a thread's now, of which no birth tells.
fn is_process(pid: Pid) -> bool {
    let gone = Err(Errno::ESRCH);
    kill(pid, None) != gone
        && !matches!(
            pidfd::open(pid),
            Err(Errno::ESRCH | Errno::EINVAL | Errno::ENOENT)
        )
}

/// An open listener, and the thread that empties it while nobody asks.
#[derive(Debug)]
struct Listening {
    followed: Arc<Mutex<Followed>>,
    /// Closed, it ends the thread.
    end: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Listening {
    /// `known` is asked once births are told: those of the children of whom it names are not missed.
    fn start(known: impl FnOnce() -> BTreeSet<Pid>) -> io::Result<Self> {
        let listener = ProcEvents::open(BUFFER)?;
        let socket = listener.as_fd().try_clone_to_owned()?;
        let mut lineage = Lineage::default();
        lineage.set(known().into_iter());
        let followed = Arc::new(Mutex::new(Followed {
            listener,
            lineage,
            events: Vec::new(),
            lost: None,
        }));
        let (end, ended) = UnixStream::pair()?;
        let thread = {
            let followed = Arc::clone(&followed);
            thread::Builder::new()
                .name("births".to_owned())
                .spawn(move || keep_following(&followed, &socket, &ended))?
        };
        Ok(Self {
            followed,
            end: Some(end),
            thread: Some(thread),
        })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // It does not panic, and there is nothing to be done if it has.
            let _ = thread.join();
        }
    }
}

/// Follows until `end` is closed or events were lost, which the next to ask finds out.
fn keep_following(followed: &Mutex<Followed>, socket: &OwnedFd, end: &UnixStream) {
    // Signals are for the threads of whoever uses us.
    let _ = SigSet::all().thread_block();
    let mut count = 0;
    loop {
        let [ended, told] = ready([end.as_fd(), socket.as_fd()], PollTimeout::NONE);
        if ended || told && count < MANY && ready([end.as_fd()], REST.into())[0] {
            return;
        }
        let followed = followed.lock().follow(Extent::Queued);
        match followed {
            Ok(events) => count = events,
            Err(_) => return,
        }
    }
}

/// Waits for any of these to become readable or closed.
fn ready<const N: usize>(descriptors: [BorrowedFd<'_>; N], timeout: PollTimeout) -> [bool; N] {
    let mut set = descriptors.map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN));
    // Interrupted: none is ready, and the caller comes again.
    let _ = poll(&mut set, timeout);
    set.map(|descriptor| descriptor.any().unwrap_or(false))
}
