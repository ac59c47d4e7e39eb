//! The kinds of records, their stable numbers and their versions.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal, version $version:literal, $text:literal;)+) => {
        /// What a record describes. Numbers are part of the image format: never reused, never changed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        #[repr(u16)]
        pub enum Kind {
            $($(#[$doc])* $name = $number,)+
        }

        impl Kind {
            /// Every kind, by number.
            pub const ALL: &'static [Kind] = &[$(Kind::$name),+];

            /// The kind of this number, if there is one.
            #[must_use]
            pub const fn from_number(number: u16) -> Option<Kind> {
                match number {
                    $($number => Some(Kind::$name),)+
                    _ => None,
                }
            }

            /// The version of the payload that this build writes, and the newest it reads.
            #[must_use]
            pub const fn version(self) -> u16 {
                match self {
                    $(Kind::$name => $version,)+
                }
            }

            /// The name in words, as errors and statistics show it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Kind::$name => $text,)+
                }
            }
        }
    };
}

kinds! {
    /// The first record of every image: where and when it was made. Written by the context itself.
    ImageHeader = 1, version 1, "image header";
    /// The last record: count, length and checksum of what came before. Written by the context itself.
    Trailer = 2, version 1, "trailer";
    /// Why the checkpoint failed, as text. Written by [`Context::fail`](super::Context::fail).
    Error = 3, version 1, "error";

    /// The process tree: its root and who is whose parent.
    Tree = 16, version 1, "process tree";
    /// One process.
    Process = 17, version 1, "process";
    /// One thread: registers and what else belongs to it alone.
    Thread = 18, version 1, "thread";
    /// Signal dispositions, shared by `CLONE_SIGHAND`.
    SignalHandlers = 19, version 1, "signal handlers";
    /// Signals that wait for a thread or a process.
    PendingSignals = 20, version 1, "pending signals";
    /// Interval and POSIX timers of a process.
    Timers = 21, version 1, "timers";
    /// User and group ids, capabilities and what goes with them.
    Credentials = 22, version 1, "credentials";
    /// The namespaces a process lives in.
    Namespaces = 23, version 1, "namespaces";
    /// How long the call that a thread waits in was to wait still.
    TimeLeft = 24, version 1, "time left";

    /// One address space, shared by `CLONE_VM`.
    AddressSpace = 32, version 1, "address space";
    /// The VMAs of an address space.
    VmaList = 33, version 1, "VMA list";
    /// The ranges of an address space that had pages.
    PopulatedRanges = 34, version 1, "populated ranges";
    /// The content of a shared memory object.
    SharedMemory = 35, version 1, "shared memory";
    /// The program of an address space, and the files behind its mappings.
    Program = 36, version 1, "program";
    /// What madvise(2) and the like had set on the VMAs of an address space.
    MemoryFlags = 37, version 1, "memory flags";
    /// Where the parts of a program are in its address space.
    ProgramBounds = 38, version 1, "program bounds";
    /// The auxiliary vector of a program.
    AuxiliaryVector = 39, version 1, "auxiliary vector";
    /// The guards (`MADV_GUARD_INSTALL`) of an address space.
    Guards = 40, version 1, "guards";
    /// Contents of pages. An object may have many.
    Pages = 41, version 1, "pages";
    /// Which pages of an object are where.
    PageIndex = 42, version 1, "page index";
    /// The System V shared memory segments of a tree.
    Segments = 43, version 1, "segments";
    /// A file without a name that was open or mapped.
    NamelessFile = 44, version 1, "nameless file";
    /// The checkpoint that an image was made of.
    Checkpoint = 45, version 1, "checkpoint";

    /// The files of a mounted file system that goes back with the tree.
    FileArea = 46, version 1, "files";

    /// The NUMA policies of an address space, if any VMA has one.
    MemoryPolicies = 47, version 1, "memory policies";

    /// One descriptor table, shared by `CLONE_FILES`.
    FileTable = 48, version 1, "file table";
    /// An open file description of a regular file, a directory or a plain device.
    OpenFile = 49, version 1, "open file";
    /// A pipe or FIFO with its content.
    Pipe = 50, version 1, "pipe";
    /// A unix socket with its queue.
    UnixSocket = 51, version 1, "unix socket";
    /// A TCP socket.
    TcpSocket = 52, version 1, "TCP socket";
    /// A UDP socket.
    UdpSocket = 53, version 1, "UDP socket";
    /// An eventfd.
    Eventfd = 54, version 1, "eventfd";
    /// An epoll instance and what it watches.
    Epoll = 55, version 1, "epoll";
    /// A timerfd.
    Timerfd = 56, version 1, "timerfd";
    /// A signalfd.
    Signalfd = 57, version 1, "signalfd";
    /// An inotify instance and its watches.
    Inotify = 58, version 1, "inotify";
    /// A memfd.
    Memfd = 59, version 1, "memfd";
    /// An open file description that is kept as it is and not described further.
    OtherFile = 60, version 1, "other file";
    /// The file locks of a tree.
    FileLocks = 61, version 1, "file locks";
    /// A terminal: what all its descriptions have in common.
    Terminal = 72, version 1, "terminal";
    /// The System V semaphores and message queues of a tree.
    SystemVIpc = 73, version 1, "System V IPC";
    /// What is mounted in a mount namespace of a tree's own.
    Mounts = 74, version 1, "mounts";
}

impl Kind {
    /// The number in the frame.
    #[must_use]
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// Whether an object may have any number of records of this kind.
    #[must_use]
    pub const fn is_repeated(self) -> bool {
        matches!(self, Kind::Pages)
    }

    /// Whether only the context itself writes this kind.
    #[must_use]
    pub const fn is_framing(self) -> bool {
        matches!(self, Kind::ImageHeader | Kind::Trailer | Kind::Error)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn numbers_and_names_are_unique_and_lead_back() {
        let names: HashSet<_> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        assert_eq!(names.len(), Kind::ALL.len());
        for &kind in Kind::ALL {
            assert_eq!(Kind::from_number(kind.number()), Some(kind));
            assert_ne!(kind.version(), 0);
        }
        assert_eq!(Kind::from_number(0), None);
        assert_eq!(Kind::from_number(u16::MAX), None);
    }
}
