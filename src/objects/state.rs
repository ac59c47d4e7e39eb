//! What each kind of description adds to what all have: one enum that dispatches to the files of the kinds.

use serde::{Deserialize, Serialize};

use super::live::Live;
use super::model::Complaint;
use super::{Error, epoll, eventfd, file, inotify, pipe, signalfd, socket, timerfd};

/// The state of a description beyond [`Common`](super::model::Common).
// Sockets are the largest by far; there are too few descriptions for that to matter.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Something in a file system.
    File(file::State),
    /// An end of a pipe or FIFO.
    Pipe(pipe::State),
    /// An eventfd.
    Eventfd(eventfd::State),
    /// An epoll instance.
    Epoll(epoll::State),
    /// A timerfd.
    Timerfd(timerfd::State),
    /// A signalfd.
    Signalfd(signalfd::State),
    /// An inotify instance.
    Inotify(inotify::State),
    /// A socket of any family.
    Socket(socket::State),
}

/// What must be done to a description that is there so that it is as recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// To an eventfd.
    Eventfd(eventfd::Change),
    /// To a timerfd.
    Timerfd(timerfd::Change),
    /// To a signalfd: the mask to set.
    Signalfd(signalfd::State),
    /// To an inotify instance.
    Inotify(inotify::Change),
}

/// What planning found of a description that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is as recorded.
    Keep,
    /// It can be changed back.
    Change(Change),
    /// It can't, but another one can be made and put in its place.
    Replace,
}

/// The kinds that all have the one anonymous inode in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anonymous {
    /// An eventfd.
    Eventfd,
    /// An epoll instance.
    Epoll,
    /// A timerfd.
    Timerfd,
    /// A signalfd.
    Signalfd,
    /// An inotify instance.
    Inotify,
}

/// Which of the anonymous kinds it is; `None` if it is none of them. To be asked of a description with an anonymous inode
/// only: for others it costs a look at the name.
pub fn anonymous(live: &Live<'_>) -> Result<Option<Anonymous>, Error> {
    let info = live.fdinfo()?;
    let telling = [
        ("eventfd-count", Anonymous::Eventfd),
        ("tfd", Anonymous::Epoll),
        ("clockid", Anonymous::Timerfd),
        ("sigmask", Anonymous::Signalfd),
    ];
    if let Some((_, kind)) = telling.into_iter().find(|(field, _)| info.has(field)) {
        return Ok(Some(kind));
    }
    Ok(match live.link()? {
        "anon_inode:[eventfd]" => Some(Anonymous::Eventfd),
        "anon_inode:[eventpoll]" => Some(Anonymous::Epoll),
        "anon_inode:[timerfd]" => Some(Anonymous::Timerfd),
        "anon_inode:[signalfd]" => Some(Anonymous::Signalfd),
        "anon_inode:inotify" => Some(Anonymous::Inotify),
        _ => None,
    })
}

impl State {
    /// Records a description, or refuses it by name.
    pub fn capture(live: &Live<'_>) -> Result<Self, Error> {
        if live.common.flags & libc::O_PATH != 0 {
            return file::capture(live).map(Self::File);
        }
        match live.common.file_type() {
            libc::S_IFSOCK => return socket::capture(live).map(Self::Socket),
            libc::S_IFIFO => {
                let link = live.link()?;
                let fifo = (!link.starts_with("pipe:")).then(|| link.to_owned());
                return Ok(Self::Pipe(pipe::State { fifo }));
            }
            libc::S_IFREG | libc::S_IFDIR | libc::S_IFCHR | libc::S_IFBLK => {
                return file::capture(live).map(Self::File);
            }
            _ => {}
        }
        match anonymous(live)? {
            Some(Anonymous::Eventfd) => eventfd::capture(live).map(Self::Eventfd),
            Some(Anonymous::Epoll) => epoll::capture(live).map(Self::Epoll),
            Some(Anonymous::Timerfd) => timerfd::capture(live).map(Self::Timerfd),
            Some(Anonymous::Signalfd) => signalfd::capture(live).map(Self::Signalfd),
            Some(Anonymous::Inotify) => inotify::capture(live).map(Self::Inotify),
            None => file::capture(live).map(Self::File),
        }
    }

    /// Which of the anonymous kinds it is.
    pub fn anonymous(&self) -> Option<Anonymous> {
        match self {
            Self::Eventfd(_) => Some(Anonymous::Eventfd),
            Self::Epoll(_) => Some(Anonymous::Epoll),
            Self::Timerfd(_) => Some(Anonymous::Timerfd),
            Self::Signalfd(_) => Some(Anonymous::Signalfd),
            Self::Inotify(_) => Some(Anonymous::Inotify),
            Self::File(_) | Self::Pipe(_) | Self::Socket(_) => None,
        }
    }

    /// The state now of the description that was recorded as `self`, and is of the same kind; `None` if there is nothing
    /// that could have changed.
    pub fn observe(&self, live: &Live<'_>) -> Result<Option<Self>, Error> {
        match self {
            Self::File(recorded) if recorded.form == file::Form::Memfd => {
                file::capture(live).map(Self::File)
            }
            Self::File(_) | Self::Pipe(_) => return Ok(None),
            Self::Eventfd(_) => eventfd::capture(live).map(Self::Eventfd),
            Self::Epoll(_) => epoll::capture(live).map(Self::Epoll),
            Self::Timerfd(_) => timerfd::capture(live).map(Self::Timerfd),
            Self::Signalfd(_) => signalfd::capture(live).map(Self::Signalfd),
            Self::Inotify(recorded) => recorded.observe(live).map(Self::Inotify),
            Self::Socket(recorded) => recorded.observe(live).map(Self::Socket),
        }
        .map(Some)
    }

    /// What must change to make `now` equal to `self`. Epoll instances are planned apart, since what they watch counts too,
    /// and sockets, since both ends of a connection go back together.
    pub fn difference(&self, now: &Self) -> Result<Verdict, Complaint> {
        let verdict = |change: Option<Option<Change>>| match change {
            Some(Some(change)) => Verdict::Change(change),
            Some(None) => Verdict::Keep,
            None => Verdict::Replace,
        };
        Ok(match (self, now) {
            (Self::File(recorded), Self::File(now)) => {
                recorded.check(now)?;
                Verdict::Keep
            }
            (Self::Pipe(_), Self::Pipe(_))
            | (Self::Epoll(_), Self::Epoll(_))
            | (Self::Socket(_), Self::Socket(_)) => Verdict::Keep,
            (Self::Eventfd(recorded), Self::Eventfd(now)) => verdict(
                recorded
                    .difference(now)
                    .map(|change| change.map(Change::Eventfd)),
            ),
            (Self::Timerfd(recorded), Self::Timerfd(now)) => verdict(
                recorded
                    .difference(now)
                    .map(|change| change.map(Change::Timerfd)),
            ),
            (Self::Signalfd(recorded), Self::Signalfd(now)) => verdict(Some(
                (recorded != now).then_some(Change::Signalfd(*recorded)),
            )),
            (Self::Inotify(recorded), Self::Inotify(now)) => verdict(
                recorded
                    .difference(now)?
                    .map(|change| change.map(Change::Inotify)),
            ),
            _ => Verdict::Replace,
        })
    }
}
