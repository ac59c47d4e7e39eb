//! The client's side of the protocol.

use std::io::{self, BufReader, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use crate::keeper::directory::{Found, Locked};
use crate::keeper::launch::{self, Errand};
use crate::keeper::protocol::{Hello, Request, Response, VERSION, append, receive};
use crate::keeper::{Error, StateDirectory};

/// How long a listener may take to say hello before it is taken for something else. A keeper says it as soon as it
/// has the request, whatever it is busy with; a keeper that starts says it when it has attached.
const HELLO_PATIENCE: Duration = Duration::from_secs(30);

/// How often a keeper may end between our connecting and its hearing us before we give up.
const ATTEMPTS: usize = 100;

/// A connection to a keeper.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    label: String,
    log: PathBuf,
}

/// What became of a request.
enum Heard {
    Answered(Box<Response>),
    /// The keeper ended before it took the request on.
    Not,
}

impl Client {
    /// Asks the keeper that runs.
    ///
    /// # Errors
    ///
    /// [`Error::NoKeeper`] if none runs, [`Error::Died`] if it was killed (what it left is removed).
    pub fn ask(directory: &StateDirectory, request: &Request) -> Result<Response, Error> {
        Client::ask_and_watch(directory, request, &mut |_, _| {})
    }

    /// The same; `watch` is told how far it is, in bytes done and bytes in all.
    ///
    /// # Errors
    ///
    /// As [`Client::ask`].
    pub fn ask_and_watch(
        directory: &StateDirectory,
        request: &Request,
        watch: &mut dyn FnMut(u64, u64),
    ) -> Result<Response, Error> {
        for _ in 0..ATTEMPTS {
            let stream = match directory.connect()? {
                Found::Keeper(stream) => stream,
                Found::Nothing => return Err(no_keeper(directory)),
                Found::Stale if !directory.remove_stale()? => continue,
                Found::Stale => {
                    return Err(Error::Died {
                        label: directory.label().to_owned(),
                    });
                }
            };
            let mut client = Client::new(stream, directory);
            if let Heard::Answered(response) = client.first(request, watch)? {
                return Ok(*response);
            }
        }
        Err(no_keeper(directory))
    }

    /// Asks the keeper that runs, or a new one.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn ask_or_start(
        directory: &StateDirectory,
        errand: &Errand,
        request: &Request,
    ) -> Result<Response, Error> {
        let start = |locked: &Locked| launch::start(directory, locked, errand);
        Client::ask_or_start_with(directory, start, request)
    }

    /// The same with another way to start a keeper.
    pub(super) fn ask_or_start_with(
        directory: &StateDirectory,
        start: impl Fn(&Locked) -> Result<UnixStream, Error>,
        request: &Request,
    ) -> Result<Response, Error> {
        for _ in 0..ATTEMPTS {
            let (stream, is_new) = launch::connect_or_start(directory, &start)?;
            match Client::new(stream, directory).first(request, &mut |_, _| {})? {
                Heard::Answered(response) => return Ok(*response),
                Heard::Not if is_new => {
                    let log = std::fs::read_to_string(directory.log_path()).unwrap_or_default();
                    directory.remove_stale()?;
                    return Err(Error::Start(match log.trim() {
                        "" => "it was killed".to_owned(),
                        log => format!("it ended: {log}"),
                    }));
                }
                Heard::Not => {}
            }
        }
        Err(Error::Start(
            "keepers of this container keep ending".to_owned(),
        ))
    }

    /// Takes over a connection.
    pub(super) fn new(stream: UnixStream, directory: &StateDirectory) -> Client {
        Client {
            stream: BufReader::new(stream),
            label: directory.label().to_owned(),
            log: directory.log_path(),
        }
    }

    fn first(
        &mut self,
        request: &Request,
        watch: &mut dyn FnMut(u64, u64),
    ) -> Result<Heard, Error> {
        self.check_peer()?;
        let mut lines = Vec::with_capacity(512);
        append(&mut lines, &Hello::new())
            .and_then(|()| append(&mut lines, request))
            .map_err(|error| Error::Protocol(error.to_string()))?;
        self.set_patience(Some(HELLO_PATIENCE))?;
        // A keeper that is ending may close the connection while we write: then it has not heard us.
        let hello: Option<Hello> = match io::Write::write_all(self.stream.get_mut(), &lines) {
            Ok(()) => match receive(&mut self.stream) {
                Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Err(self.not_a_keeper("does not answer"));
                }
                Err(error) if error.kind() == ErrorKind::InvalidData => {
                    return Err(self.not_a_keeper("does not speak our protocol"));
                }
                other => other.map_err(|_| self.broken())?,
            },
            Err(_) => None,
        };
        let Some(hello) = hello else {
            return Ok(Heard::Not);
        };
        if hello.protocol != VERSION {
            return Err(Error::Version {
                theirs: hello.protocol,
                ours: VERSION,
            });
        }
        self.set_patience(None)?;
        Ok(Heard::Answered(Box::new(self.response(watch)?)))
    }

    fn response(&mut self, watch: &mut dyn FnMut(u64, u64)) -> Result<Response, Error> {
        loop {
            match receive(&mut self.stream) {
                Ok(Some(Response::Progress { done, total })) => watch(done, total),
                Ok(Some(response)) => return Ok(response),
                Err(error) if error.kind() == ErrorKind::InvalidData => {
                    return Err(Error::Protocol(error.to_string()));
                }
                Ok(None) | Err(_) => return Err(self.broken()),
            }
        }
    }

    /// The listener must be ours or root's: anybody else would be told what we ask.
    fn check_peer(&self) -> Result<(), Error> {
        let peer = getsockopt(self.stream.get_ref(), PeerCredentials)
            .map_err(|errno| Error::io("cannot tell who listens on", &self.log)(errno.into()))?;
        if peer.uid() == 0 || peer.uid() == geteuid().as_raw() {
            Ok(())
        } else {
            Err(self.not_a_keeper("belongs to another user"))
        }
    }

    fn set_patience(&self, patience: Option<Duration>) -> Result<(), Error> {
        let set = self.stream.get_ref().set_read_timeout(patience);
        set.map_err(Error::io("cannot set the patience of", &self.log))
    }

    fn not_a_keeper(&self, how: &str) -> Error {
        Error::Taken {
            path: self.log.with_file_name("socket"),
            what: format!("its listener {how}"),
        }
    }

    fn broken(&self) -> Error {
        Error::Broken {
            label: self.label.clone(),
            log: self.log.clone(),
        }
    }
}

fn no_keeper(directory: &StateDirectory) -> Error {
    Error::NoKeeper {
        label: directory.label().to_owned(),
    }
}
