//! What takes long and needs no tracer: it is done on the thread of the client's connection, beside other requests.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::image::{Progress, Summary, Why};
use crate::keeper::protocol::{Failure, Response, send};

/// How often a client is told how far it is, in milliseconds.
const PERIOD: u16 = 100;

/// The writing of an image.
pub struct Work {
    /// How far it is, and the way to cancel it.
    pub progress: Arc<Progress>,
    /// Does it.
    pub run: Box<dyn FnOnce() -> Result<Summary, Failure> + Send>,
}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work")
            .field("progress", &self.progress)
            .finish_non_exhaustive()
    }
}

impl Work {
    /// Does it and tells the client how far it is; cancels it if that hangs up.
    ///
    /// # Errors
    ///
    /// No thread can be had.
    pub(super) fn follow(self, client: &UnixStream) -> io::Result<Response> {
        let Self { progress, run } = self;
        let (ended, end) = UnixStream::pair()?;
        let worker = thread::Builder::new()
            .name("persist".to_owned())
            .spawn(move || {
                let _ended = ended;
                run()
            })?;
        let mut client = Some(client);
        loop {
            // Without events only a hang-up is told.
            let mut polled = vec![PollFd::new(end.as_fd(), PollFlags::POLLIN)];
            polled.extend(client.map(|client| PollFd::new(client.as_fd(), PollFlags::empty())));
            let waited = match client {
                Some(_) => poll(&mut polled, PERIOD),
                None => poll(&mut polled, PollTimeout::NONE),
            };
            match waited {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other?,
            };
            let fired: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(true)).collect();
            if fired[0] {
                break;
            }
            let (done, total) = progress.bytes();
            let is_gone = fired.get(1).copied().unwrap_or(false)
                || client.is_some_and(|mut client| {
                    send(&mut client, &Response::Progress { done, total }).is_err()
                });
            if is_gone && client.take().is_some() {
                progress.cancel(Why::Unwanted);
            }
        }
        let died = || Failure::Error {
            message: "the thread that wrote the image died: see the log".to_owned(),
        };
        let done = worker.join().unwrap_or_else(|_| Err(died()));
        Ok(match done {
            Ok(summary) => Response::Persisted { summary },
            Err(failure) => {
                tracing::warn!("persist: {failure}");
                Response::Failure(failure)
            }
        })
    }
}

/// What is being done, to be cancelled when the keeper ends.
#[derive(Debug, Default)]
pub(super) struct Works {
    running: Vec<Weak<Progress>>,
    is_ending: bool,
}

impl Works {
    pub(super) fn add(&mut self, work: &Work) {
        self.running.retain(|progress| progress.strong_count() > 0);
        self.running.push(Arc::downgrade(&work.progress));
        if self.is_ending {
            work.progress.cancel(Why::Ending);
        }
    }

    pub(super) fn cancel(&mut self) {
        self.is_ending = true;
        for progress in self.running.iter().filter_map(Weak::upgrade) {
            progress.cancel(Why::Ending);
        }
    }
}
