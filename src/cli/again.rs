//! A rollback of a container that has ended: it is created anew, and its keeper makes of it what the checkpoint says.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use anyhow::{Context, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Whence, dup2, lseek};

use super::Global;
use super::foreground::Signals;
use super::target::{ask, failed, report};
use crate::container::again::Again;
use crate::engine::Stream;
use crate::keeper::protocol::{Request, Response};
use crate::keeper::{self, Errand};
use crate::outcome::Report;

/// Creates the container anew and has it filled. `None`: it has not ended any more.
pub(super) fn roll_back(
    global: &Global,
    errand: &Errand,
    name: &str,
    verify: bool,
) -> anyhow::Result<Option<Report>> {
    let signals = Signals::hold()?;
    let Some(again) = Again::begin(&global.root, &errand.label)? else {
        return Ok(None);
    };
    let prepare = Request::PrepareAgain {
        name: name.to_owned(),
    };
    let streams = match ask(errand, &prepare)? {
        Response::Prepared { streams } => streams,
        Response::Failure(failure) => return Err(failed(failure)),
        other => return Err(keeper::Error::Protocol(format!("{other:?}")).into()),
    };
    let ours = Ours::put_away(&streams)?;
    let created = again.create(signals.before);
    ours.take_back()?;
    let child = match created {
        Ok(child) => child,
        Err(error) => {
            again.give_up()?;
            return Err(anyhow::Error::from(error).context("creating the container anew"));
        }
    };
    let make = Request::MakeAgain {
        name: name.to_owned(),
        root: child.pid.as_raw(),
        verify,
    };
    let made = ask(errand, &make).map_err(anyhow::Error::from);
    match made.and_then(report) {
        Ok(report) => {
            again.finish(&child)?;
            Ok(Some(report))
        }
        Err(error) => {
            again.give_up()?;
            Err(error.context("the container is stopped, as it was before"))
        }
    }
}

/// Our standard streams, while those of a container are in their place.
struct Ours([OwnedFd; 3]);

impl Ours {
    fn put_away(streams: &[Option<Stream>; 3]) -> anyhow::Result<Self> {
        let what = || "passing the container its standard streams";
        let theirs = [0, 1, 2].map(|number| open(streams[number].as_ref()));
        let ours = [0, 1, 2].map(keep);
        let [a, b, c] = ours;
        let ours = Self([
            a.with_context(what)?,
            b.with_context(what)?,
            c.with_context(what)?,
        ]);
        for (number, stream) in theirs.into_iter().enumerate() {
            let stream = stream.with_context(what)?;
            if let Err(errno) = dup2(stream.as_raw_fd(), number as i32) {
                ours.take_back()?;
                bail!("{}: {errno}", what());
            }
        }
        Ok(ours)
    }

    fn take_back(self) -> anyhow::Result<()> {
        for (number, stream) in self.0.iter().enumerate() {
            dup2(stream.as_raw_fd(), number as i32).context("taking our standard streams back")?;
        }
        Ok(())
    }
}

fn keep(number: i32) -> io::Result<OwnedFd> {
    use std::os::fd::BorrowedFd;
    let streams: [BorrowedFd<'_>; 3] = [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ];
    streams[number as usize].try_clone_to_owned()
}

/// Opens what a stream led to; `/dev/null` if that is not there any more, or nobody reads from it.
fn open(stream: Option<&Stream>) -> io::Result<File> {
    let null = || OpenOptions::new().read(true).write(true).open("/dev/null");
    let Some(stream) = stream else {
        return null();
    };
    let access = stream.flags & libc::O_ACCMODE;
    let kept = stream.flags & (libc::O_APPEND | libc::O_NONBLOCK);
    let opened = OpenOptions::new()
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        // Without a reader a pipe would not be opened before there is one.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | (kept & libc::O_APPEND))
        .open(&stream.path);
    let Ok(file) = opened else {
        return null();
    };
    fcntl(
        file.as_raw_fd(),
        FcntlArg::F_SETFL(OFlag::from_bits_retain(kept)),
    )?;
    if access != libc::O_RDONLY && file.metadata()?.mode() & libc::S_IFMT == libc::S_IFREG {
        // A log goes on at its end.
        lseek(file.as_raw_fd(), 0, Whence::SeekEnd)?;
    }
    Ok(file)
}
