//! The keeper's side of the protocol: a thread that listens, one per connection, one that works.

use std::io::{self, BufReader, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;
use parking_lot::{Condvar, Mutex};

use crate::engine::Stream;
use crate::fault;
use crate::image::{Encoding, Inspection, Options, Summary};
use crate::keeper::directory::Locked;
use crate::keeper::protocol::{
    Change, CheckpointInfo, Failure, FileOptions, Hello, KeepOptions, Request, Response, VERSION,
    append, receive, send,
};
use crate::keeper::watched::Watched;
use crate::keeper::work::{Work, Works};
use crate::keeper::{Error, Identity, StateDirectory};
use crate::kernel::disposition;
use crate::outcome::Report;

/// How long a client may take to read an answer when the keeper ends.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);

/// What the keeper can do with the tree; carried out on one thread, which also made the value.
pub trait Operations {
    /// Takes a checkpoint.
    ///
    /// # Errors
    ///
    /// Refused or failed; the tree runs as before.
    fn checkpoint(
        &mut self,
        name: &str,
        files: &FileOptions,
        keep: KeepOptions,
    ) -> Result<Report, Failure>;
    /// Rolls the tree back.
    ///
    /// # Errors
    ///
    /// Refused or failed with the tree as before, or lost with the tree killed.
    fn rollback(&mut self, name: &str, verify: bool) -> Result<Report, Failure>;
    /// What has become of files since a checkpoint.
    ///
    /// # Errors
    ///
    /// Refused or failed; the tree runs as before.
    fn diff(&mut self, name: &str) -> Result<Vec<Change>, Failure>;
    /// Takes a checkpoint, writes it to a directory, and ends the tree.
    ///
    /// # Errors
    ///
    /// Refused or failed; the tree runs as before.
    fn move_out(
        &mut self,
        to: &Path,
        encoding: Encoding,
        files: &FileOptions,
    ) -> Result<Summary, Failure>;
    /// What is in a checkpoint.
    ///
    /// # Errors
    ///
    /// There is none of that name.
    fn inspect(&self, name: &str) -> Result<Inspection, Failure>;
    /// Prepares to write a checkpoint to a directory.
    ///
    /// # Errors
    ///
    /// Refused or failed; nothing was touched.
    fn persist(&mut self, name: &str, to: &Path, options: Options) -> Result<Work, Failure>;
    /// Makes of the tree what an image says, of which pages may be in another keeper's checkpoint.
    ///
    /// # Errors
    ///
    /// Refused or failed; the tree is killed.
    fn restore(&mut self, name: &str, from: (&Path, bool), verify: bool)
    -> Result<Report, Failure>;
    /// Prepares to make a container again that has ended; returns its standard streams.
    ///
    /// # Errors
    ///
    /// Refused or failed; nothing was touched.
    fn prepare_again(&mut self, name: &str) -> Result<[Option<Stream>; 3], Failure>;
    /// Makes it of an init that waits.
    ///
    /// # Errors
    ///
    /// It was not made; the checkpoints are kept.
    fn make_again(&mut self, name: &str, root: i32, verify: bool) -> Result<Report, Failure>;
    /// The container is about to be deleted.
    ///
    /// # Errors
    ///
    /// Checkpoints could not be freed.
    fn end_with_container(&mut self) -> Result<(), Failure>;
    /// The checkpoints held, oldest first.
    fn checkpoints(&self) -> Vec<CheckpointInfo>;
    /// Frees one checkpoint, or all.
    ///
    /// # Errors
    ///
    /// There is none of that name, or it could not be freed.
    fn release(&mut self, name: Option<&str>) -> Result<(), Failure>;
    /// How many checkpoints are held: with none left the keeper ends.
    fn held(&self) -> usize;
    /// Whether the tree's root still lives.
    fn is_alive(&self) -> bool;
    /// Whether a rollback may bring back a tree whose root has ended.
    fn can_come_back(&self) -> bool;
    /// PID of the tree's root: a rollback may have made it again.
    fn root(&self) -> i32;
    /// A child or tracee has died: collects its death, without which its PID namespace does not end.
    fn collect_deaths(&mut self);
}

enum Job {
    Request {
        request: Request,
        reply: Sender<Answer>,
    },
    /// The last connection was closed.
    Idle,
    /// The tree's root has exited.
    RootDied,
    /// `SIGTERM`: the keeper shall end.
    Terminate,
    /// `SIGCHLD`: a shadow has died, perhaps because the tree is being ended.
    ChildDied,
}

/// What comes of a request.
enum Answer {
    Done(Box<Response>),
    /// Something that takes long, and that the tracer has no part in.
    Begun(Work),
}

/// What the threads know of one another.
#[derive(Default)]
struct Gate {
    /// No request is taken on any more.
    ending: bool,
    /// Requests taken on and not yet carried out.
    waiting: usize,
    /// Requests taken on and not yet answered.
    unanswered: usize,
    /// Open connections.
    connections: usize,
    /// The client that started the keeper has not been heard yet; it must be before there can be nothing to keep.
    awaits_first: bool,
}

struct Shared {
    gate: Mutex<Gate>,
    answered: Condvar,
    jobs: Mutex<Sender<Job>>,
    directory: Mutex<StateDirectory>,
    root: Watched,
    works: Mutex<Works>,
}

/// Attaches, listens in `directory` and serves clients, beginning with `first`, until the last checkpoint is released
/// or the process `root` has exited and no rollback can bring it back.
///
/// # Errors
///
/// The socket could not be made; clients that were there have been told.
pub(super) fn serve<O: Operations>(
    directory: &StateDirectory,
    lock: Locked,
    first: UnixStream,
    root: Identity,
    attach: impl FnOnce() -> Result<O, Failure> + Send + 'static,
) -> Result<(), Error> {
    let signals =
        hold_signals().map_err(Error::io("cannot take signals for", directory.log_path()))?;
    let (jobs, queue) = channel();
    let shared = Arc::new(Shared {
        gate: Mutex::new(Gate {
            awaits_first: true,
            ..Gate::default()
        }),
        answered: Condvar::new(),
        jobs: Mutex::new(jobs),
        directory: Mutex::new(directory.clone()),
        root: Watched::new().map_err(|errno| Error::Start(errno.to_string()))?,
        works: Mutex::default(),
    });
    let (attached, is_attached) = channel();
    let (ended, end) = UnixStream::pair().map_err(|error| Error::Start(error.to_string()))?;
    let tracer = {
        let shared = Arc::clone(&shared);
        let work = move || {
            let _ended = ended;
            match attach() {
                Ok(operations) => {
                    let _ = attached.send(Ok(()));
                    work(&shared, &queue, operations);
                }
                Err(failure) => {
                    let _ = attached.send(Err(failure));
                }
            }
        };
        let named = thread::Builder::new().name("tracer".to_owned());
        named
            .spawn(work)
            .map_err(|error| Error::Start(error.to_string()))?
    };
    let ready = is_attached
        .recv()
        .unwrap_or_else(|_| Err(failure("the tracer thread died: see the log")))
        .and_then(|()| shared.root.watch(root))
        .and_then(|()| {
            fault::point("keeper.attached");
            lock.listen(directory)
                .map_err(|error| failure(&error.to_string()))
        });
    let listener = match ready {
        Ok(listener) => listener,
        Err(failure) => {
            // Nobody else can have connected yet, and whoever waits for the lock will start a keeper anew.
            let removed = directory.remove(&lock);
            drop(lock);
            decline(first, failure.clone());
            removed?;
            return Err(Error::Start(failure.to_string()));
        }
    };
    drop(lock);
    fault::point("keeper.listening");
    converse(&shared, first, true);
    listen(&shared, &listener, &signals, &end)
        .map_err(Error::io("cannot serve", directory.log_path()))?;
    // The tracer has ended: in good order, or by a panic that left the directory behind.
    let ended = tracer.join();
    if ended.is_err() {
        shared.directory.lock().retire()?;
    }
    let mut gate = shared.gate.lock();
    gate.ending = true;
    while ended.is_ok() && gate.unanswered > 0 {
        if shared
            .answered
            .wait_for(&mut gate, WRITE_PATIENCE)
            .timed_out()
        {
            break;
        }
    }
    match ended {
        Ok(()) => Ok(()),
        Err(_) => Err(Error::Start("the tracer thread died".to_owned())),
    }
}

fn failure(message: &str) -> Failure {
    Failure::Error {
        message: message.to_owned(),
    }
}

fn hold_signals() -> io::Result<SignalFd> {
    disposition::tell_deaths_only()?;
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGCHLD);
    set.thread_block()?;
    Ok(SignalFd::with_flags(
        &set,
        SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
    )?)
}

/// Takes connections until the tracer's end of `end` is closed.
fn listen(
    shared: &Arc<Shared>,
    listener: &UnixListener,
    signals: &SignalFd,
    end: &UnixStream,
) -> io::Result<()> {
    let exit = shared.root.exit();
    let watched = [end.as_fd(), listener.as_fd(), signals.as_fd(), exit];
    loop {
        let mut polled: Vec<PollFd> = watched
            .iter()
            .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
            .collect();
        match poll(&mut polled, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other?,
        };
        let fired: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        if fired[0] {
            return Ok(());
        }
        if fired[1] {
            match listener.accept() {
                Ok((stream, _)) => converse(shared, stream, false),
                Err(error) => tracing::warn!("cannot take a connection: {error}"),
            }
        }
        if fired[2] {
            while let Some(info) = signals.read_signal()? {
                shared.tell(if info.ssi_signo == Signal::SIGCHLD as u32 {
                    Job::ChildDied
                } else {
                    Job::Terminate
                });
            }
        }
        if fired[3] && shared.root.has_exited()? {
            shared.tell(Job::RootDied);
        }
    }
}

impl Shared {
    fn tell(&self, job: Job) {
        // Without a tracer there is nobody to tell, and we are ending.
        let _ = self.jobs.lock().send(job);
    }

    /// Takes a request on; `None` if the keeper is ending.
    fn submit(&self, request: Request, is_first: bool) -> Option<Receiver<Answer>> {
        let mut gate = self.gate.lock();
        if gate.ending {
            return None;
        }
        let (reply, answer) = channel();
        self.jobs
            .lock()
            .send(Job::Request { request, reply })
            .ok()?;
        gate.awaits_first &= !is_first;
        gate.waiting += 1;
        gate.unanswered += 1;
        Some(answer)
    }

    /// Takes no requests on any more, unless there is one or the first is still to come.
    fn end_if_idle(&self) -> bool {
        let mut gate = self.gate.lock();
        gate.ending |= gate.waiting == 0 && !gate.awaits_first;
        gate.ending
    }

    fn answered(&self) {
        self.gate.lock().unanswered -= 1;
        self.answered.notify_all();
    }
}

/// Tells a client that there will be no keeper.
fn decline(stream: UnixStream, failure: Failure) {
    let _ = stream.set_read_timeout(Some(WRITE_PATIENCE));
    let _ = stream.set_write_timeout(Some(WRITE_PATIENCE));
    let mut reader = BufReader::new(&stream);
    let asked = receive::<Hello>(&mut reader).and_then(|_| receive::<Request>(&mut reader));
    if matches!(asked, Ok(Some(_))) {
        let told = send(&mut &stream, &Hello::new())
            .and_then(|()| send(&mut &stream, &Response::Failure(failure)));
        if let Err(error) = told {
            tracing::warn!("the first client has gone: {error}");
        }
    }
}

/// Serves a connection on a thread of its own; the first is that of the client that started the keeper.
fn converse(shared: &Arc<Shared>, stream: UnixStream, is_first: bool) {
    shared.gate.lock().connections += 1;
    let theirs = Arc::clone(shared);
    let spawned = thread::Builder::new()
        .name("client".to_owned())
        .spawn(move || {
            if let Err(error) = talk(&theirs, &stream, is_first) {
                tracing::info!("a client has gone: {error}");
            }
            drop(stream);
            theirs.hung_up(is_first);
        });
    if let Err(error) = spawned {
        tracing::warn!("no thread for a client: {error}");
        shared.hung_up(is_first);
    }
}

impl Shared {
    /// Does what takes long; if the client goes meanwhile, or the keeper ends, it is cancelled.
    fn follow_work(&self, work: Work, client: &UnixStream) -> io::Result<Response> {
        self.works.lock().add(&work);
        work.follow(client)
    }

    fn cancel_works(&self) {
        self.works.lock().cancel();
    }

    fn hung_up(&self, is_first: bool) {
        let left = {
            let mut gate = self.gate.lock();
            gate.connections -= 1;
            gate.awaits_first &= !is_first;
            gate.connections
        };
        if left == 0 {
            self.tell(Job::Idle);
        }
    }
}

fn talk(shared: &Shared, stream: &UnixStream, is_first: bool) -> io::Result<()> {
    let peer = getsockopt(stream, PeerCredentials)?;
    if peer.uid() != 0 && peer.uid() != geteuid().as_raw() {
        return Err(io::Error::new(ErrorKind::PermissionDenied, "not root"));
    }
    stream.set_write_timeout(Some(WRITE_PATIENCE))?;
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    match receive::<Hello>(&mut reader)? {
        None => return Ok(()),
        Some(hello) if hello.protocol != VERSION => return send(&mut writer, &Hello::new()),
        Some(_) => {}
    }
    let mut greeted = false;
    while let Some(request) = receive::<Request>(&mut reader)? {
        let Some(answer) = shared.submit(request, is_first) else {
            return Ok(());
        };
        let hello = if greeted {
            Ok(())
        } else {
            send(&mut writer, &Hello::new())
        };
        greeted = true;
        // The request is carried out to its end whether or not the client still listens.
        let answer = answer.recv();
        let sent = match answer {
            Ok(answer) => hello.and_then(|()| {
                let response = match answer {
                    Answer::Done(response) => *response,
                    Answer::Begun(work) => shared.follow_work(work, stream)?,
                };
                fault::point("keeper.reply");
                let mut line = Vec::with_capacity(1024);
                append(&mut line, &response)?;
                io::Write::write_all(&mut writer, &line)
            }),
            Err(_) => Err(io::Error::other("the tracer thread died")),
        };
        shared.answered();
        sent?;
    }
    Ok(())
}

/// Carries out jobs until there is nothing left to keep.
fn work<O: Operations>(shared: &Shared, queue: &Receiver<Job>, mut operations: O) {
    while let Ok(job) = queue.recv() {
        let (answer, end) = carry_out(&mut operations, job, shared);
        let is_last = match end {
            End::Never => false,
            End::WithoutCheckpoints => operations.held() == 0 && shared.end_if_idle(),
            End::Now => {
                shared.gate.lock().ending = true;
                true
            }
        };
        if is_last {
            // Clients must find no keeper once they have our last answer.
            if let Err(error) = shared.directory.lock().retire() {
                tracing::error!("{error}");
            }
        }
        if let Some((reply, response)) = answer {
            // Its client may have gone.
            let _ = reply.send(response);
        }
        if is_last {
            break;
        }
        await_stops(&mut operations);
    }
    drop(operations);
    shared.cancel_works();
    while let Ok(job) = queue.try_recv() {
        if let Job::Request { reply, .. } = job {
            let label = shared.directory.lock().label().to_owned();
            let gone = format!("{label} has ended, and its checkpoints with it");
            let _ = reply.send(Answer::Done(Box::new(Response::Failure(failure(&gone)))));
        }
    }
}

/// Between requests a shadow may stop because it is about to end, which is to be told, too.
fn await_stops<O: Operations>(operations: &mut O) {
    if let Err(errno) = disposition::tell_stops_too() {
        tracing::error!("SIGCHLD: {errno}");
    }
    // What has stopped before was not told.
    operations.collect_deaths();
}

/// Whether the keeper may end after a job.
enum End {
    Never,
    /// If no checkpoint is held and nobody is about to take one.
    WithoutCheckpoints,
    Now,
}

fn carry_out<O: Operations>(
    operations: &mut O,
    job: Job,
    shared: &Shared,
) -> (Option<(Sender<Answer>, Answer)>, End) {
    match job {
        Job::Request { request, reply } => {
            fault::point("keeper.request");
            // At each of its many stops the signal would only be in the way.
            if let Err(errno) = disposition::tell_deaths_only() {
                tracing::warn!("SIGCHLD: {errno}");
            }
            let response = answer(operations, &request);
            if let Err(failure) = shared.follow(operations.root()) {
                tracing::error!("{failure}");
            }
            shared.gate.lock().waiting -= 1;
            let end = match request {
                _ if has_ended(operations) => End::Now,
                Request::Checkpoint { .. }
                | Request::MoveOut { .. }
                | Request::Restore { .. }
                | Request::EndWithContainer
                | Request::Release { .. } => End::WithoutCheckpoints,
                Request::Rollback { .. }
                | Request::PrepareAgain { .. }
                | Request::MakeAgain { .. }
                | Request::Diff { .. }
                | Request::Inspect { .. }
                | Request::Persist { .. }
                | Request::Checkpoints => End::Never,
            };
            (Some((reply, response)), end)
        }
        Job::Idle => (None, End::WithoutCheckpoints),
        Job::ChildDied => {
            operations.collect_deaths();
            match has_ended(operations) {
                true => (None, End::Now),
                false => (None, End::Never),
            }
        }
        Job::RootDied => {
            let label = shared.directory.lock().label().to_owned();
            if shared.root.is_alive() {
                // The one that has ended has a successor.
                return (None, End::Never);
            }
            operations.collect_deaths();
            if !operations.can_come_back() {
                tracing::info!("{label} has ended");
                return (None, End::Now);
            }
            tracing::info!("{label} has ended; its checkpoints are kept until they are released");
            (None, End::WithoutCheckpoints)
        }
        Job::Terminate => {
            if let Err(failure) = operations.release(None) {
                tracing::error!("release at the end: {failure}");
            }
            (None, End::Now)
        }
    }
}

/// Whether the tree has ended for good.
fn has_ended<O: Operations>(operations: &mut O) -> bool {
    if operations.is_alive() {
        return false;
    }
    // What can outlive it has to be told from what can't.
    operations.collect_deaths();
    !operations.can_come_back()
}

impl Shared {
    /// Goes by the name of the tree's root and watches it, if that is another process now.
    fn follow(&self, root: i32) -> Result<(), Failure> {
        let Ok(now) = Identity::look_up(root) else {
            return Ok(());
        };
        if self.root.is(now) {
            return Ok(());
        }
        self.root.watch(now)?;
        let moved = self.directory.lock().move_to(&now.key());
        moved.map_err(|error| failure(&error.to_string()))
    }
}

fn answer<O: Operations>(operations: &mut O, request: &Request) -> Answer {
    let done = match request {
        Request::Persist {
            name,
            to,
            encoding,
            called,
            lend,
        } => {
            let options = Options {
                encoding: *encoding,
                name: called.clone(),
                lend: *lend,
            };
            match operations.persist(name, to, options) {
                Ok(work) => return Answer::Begun(work),
                Err(failure) => Err(failure),
            }
        }
        Request::Checkpoint { name, files, keep } => {
            operations.checkpoint(name, files, *keep).map(report)
        }
        Request::Rollback { name, verify } => operations.rollback(name, *verify).map(report),
        Request::MoveOut {
            to,
            encoding,
            files,
        } => {
            let moved = operations.move_out(to, *encoding, files);
            moved.map(|summary| Response::Persisted { summary })
        }
        Request::Inspect { name } => {
            operations
                .inspect(name)
                .map(|inspection| Response::Inspection {
                    inspection: Box::new(inspection),
                })
        }
        Request::Restore {
            name,
            from,
            verify,
            lent,
        } => operations.restore(name, (from, *lent), *verify).map(report),
        Request::PrepareAgain { name } => {
            let prepared = operations.prepare_again(name);
            prepared.map(|streams| Response::Prepared { streams })
        }
        Request::MakeAgain { name, root, verify } => {
            operations.make_again(name, *root, *verify).map(report)
        }
        Request::EndWithContainer => operations.end_with_container().map(|()| {
            let left = operations.held();
            Response::Released { left }
        }),
        Request::Diff { name } => operations
            .diff(name)
            .map(|changes| Response::Changes { changes }),
        Request::Checkpoints => Ok(Response::Checkpoints {
            checkpoints: operations.checkpoints(),
        }),
        Request::Release { name } => {
            operations
                .release(name.as_deref())
                .map(|()| Response::Released {
                    left: operations.held(),
                })
        }
    };
    Answer::Done(Box::new(done.unwrap_or_else(|failure| {
        tracing::warn!("{request:?}: {failure}");
        Response::Failure(failure)
    })))
}

fn report(report: Report) -> Response {
    Response::Done { report }
}
