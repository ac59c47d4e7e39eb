//! What has changed in the directories of a tree since they were looked at last.
//!
//! All directories are watched (inotify(7)), of an overlay those of the upper layer, which see all that is done through the
//! mount. A file that is mapped and stored to makes no event before its last description is closed; so opens count as changes
//! where times do not tell. A directory that is not watched, such as one made since, counts as changed, and so does everything
//! when events were lost: what counts as changed is compared.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io::{self, PipeWriter};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;
use parking_lot::Mutex;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

/// A directory: device and inode.
pub type Directory = (u64, u64);

/// Bytes of events read at once.
const BUFFER: usize = 64 << 10;

/// What has happened.
#[derive(Debug, Default)]
struct Changes {
    /// Names in watched directories.
    names: HashMap<i32, HashSet<OsString>>,
    /// Watches that have ended with their directories.
    ended: HashSet<i32>,
    /// Something is missing.
    lost: bool,
}

/// Watches directories. A thread takes the events, and ends with this.
#[derive(Debug)]
pub struct Journal {
    events: Arc<OwnedFd>,
    changes: Arc<Mutex<Changes>>,
    watches: HashMap<Directory, i32>,
    /// Closed, it ends the thread.
    end: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Journal {
    /// Begins with no directory.
    pub fn start() -> io::Result<Self> {
        let events = Arc::new(inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?);
        let changes = Arc::new(Mutex::new(Changes::default()));
        let (ended, end) = io::pipe()?;
        let thread = {
            let (events, changes) = (Arc::clone(&events), Arc::clone(&changes));
            thread::Builder::new()
                .name("files".into())
                .spawn(move || follow(events.as_fd(), &changes, ended.as_fd()))?
        };
        Ok(Self {
            events,
            changes,
            watches: HashMap::new(),
            end: Some(end),
            thread: Some(thread),
        })
    }

    /// Watches a directory from now on; what is listed of it afterwards is up to date. One that can't be watched counts as
    /// changed. `opens`: a file that is opened counts as changed.
    pub fn watch(&mut self, directory: BorrowedFd<'_>, key: Directory, opens: bool) {
        if self.watches.contains_key(&key) {
            return;
        }
        let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
        let mask = WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::ONLYDIR;
        // Ours count too: they would be more than all others, when content is kept.
        let mask = match opens {
            true => mask | WatchFlags::OPEN,
            false => mask,
        };
        match inotify::add_watch(&self.events, path, mask) {
            Ok(watch) => {
                self.watches.insert(key, watch);
            }
            Err(error) => tracing::debug!(%error, "a directory is not watched"),
        }
    }

    /// Takes what has happened until now.
    pub fn take(&mut self) {
        let mut changes = self.changes.lock();
        read(self.events.as_fd(), &mut changes);
        let ended = std::mem::take(&mut changes.ended);
        if !ended.is_empty() {
            self.watches.retain(|_, watch| !ended.contains(watch));
        }
    }

    /// What has changed, as taken last.
    pub fn changes(&self) -> Seen {
        let changes = self.changes.lock();
        let mut names = HashMap::new();
        if !changes.lost {
            for (directory, watch) in &self.watches {
                let changed = changes.names.get(watch).cloned().unwrap_or_default();
                names.insert(*directory, changed);
            }
        }
        Seen(names)
    }

    /// Begins anew: all is known as it is now.
    pub fn clear(&mut self) {
        self.take();
        let mut changes = self.changes.lock();
        changes.names.clear();
        changes.lost = false;
    }
}

/// Names that have changed in directories that were watched all the time.
#[derive(Debug, Default)]
pub struct Seen(HashMap<Directory, HashSet<OsString>>);

impl Seen {
    /// Whether nothing has happened to a name, and that is known.
    pub fn is_unchanged(&self, directory: Directory, name: &OsStr) -> bool {
        let changed = self.0.get(&directory);
        changed.is_some_and(|changed| !changed.contains(name))
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // It does nothing that could panic.
            let _ = thread.join();
        }
    }
}

/// Takes events until `ended` is closed at its other end.
fn follow(events: BorrowedFd<'_>, changes: &Mutex<Changes>, ended: BorrowedFd<'_>) {
    // Signals are for the threads of whoever uses us.
    let _ = SigSet::all().thread_block();
    loop {
        let mut wait = [
            PollFd::new(events, PollFlags::POLLIN),
            PollFd::new(ended, PollFlags::POLLIN),
        ];
        let waited = poll(&mut wait, PollTimeout::NONE);
        let is_over = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
        if waited.is_err() || is_over(&wait[1]) {
            return;
        }
        read(events, &mut changes.lock());
    }
}

/// Reads all events there are.
fn read(events: BorrowedFd<'_>, changes: &mut Changes) {
    let mut buffer = [MaybeUninit::uninit(); BUFFER];
    let mut reader = inotify::Reader::new(events, &mut buffer);
    loop {
        let event = match reader.next() {
            Ok(event) => event,
            Err(rustix::io::Errno::AGAIN) => return,
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => {
                changes.lost = true;
                return;
            }
        };
        if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
            changes.lost = true;
        } else if event.events().contains(ReadFlags::IGNORED) {
            changes.ended.insert(event.wd());
            changes.names.remove(&event.wd());
        } else if let Some(name) = event.file_name() {
            let name = OsStr::from_bytes(name.to_bytes());
            let names = changes.names.entry(event.wd()).or_default();
            if !names.contains(name) {
                names.insert(name.to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn changes_are_seen_and_what_is_not_watched_counts_as_changed() {
        let place = tempfile::tempdir().unwrap();
        let key = |path: &std::path::Path| {
            let found = fs::metadata(path).unwrap();
            (found.dev(), found.ino())
        };
        let (one, two) = (OsStr::new("one"), OsStr::new("two"));
        for name in [one, two] {
            fs::write(place.path().join(name), "before").unwrap();
        }
        let at = key(place.path());
        let mut journal = Journal::start().unwrap();
        assert!(!journal.changes().is_unchanged(at, one));
        let directory = File::open(place.path()).unwrap();
        journal.watch(directory.as_fd(), at, true);
        assert!(journal.changes().is_unchanged(at, one));
        let mut file = File::create(place.path().join(one)).unwrap();
        file.write_all(b"after").unwrap();
        journal.take();
        let changes = journal.changes();
        assert!(!changes.is_unchanged(at, one) && changes.is_unchanged(at, two));
        journal.clear();
        assert!(journal.changes().is_unchanged(at, one));
        // Many more than the kernel keeps: taken meanwhile, or known to be lost.
        for _ in 0..10_000 {
            fs::metadata(place.path().join(two)).unwrap();
            File::open(place.path().join(one)).unwrap();
            File::open(place.path().join(two)).unwrap();
        }
        journal.take();
        assert!(!journal.changes().is_unchanged(at, one));
        drop(directory);
        let below = place.path().join("below");
        fs::create_dir(&below).unwrap();
        let was = key(&below);
        journal.clear();
        journal.watch(File::open(&below).unwrap().as_fd(), was, true);
        assert!(journal.changes().is_unchanged(was, one));
        fs::remove_dir(&below).unwrap();
        journal.take();
        assert!(!journal.changes().is_unchanged(was, one));
    }
}
