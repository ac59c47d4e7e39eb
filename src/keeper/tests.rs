//! The keeper around a tree that is a counter.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use super::directory::{Found, Locked};
use super::protocol::*;
use super::server::serve;
use super::*;
use crate::engine::Stream;
use crate::image::{Encoding, Inspection, Options, Progress, Summary};
use crate::outcome::{Outcome, Refusal, Report};

/// What the fake tree does. Shared by all keepers that a test starts.
#[derive(Default)]
struct Script {
    /// Attached so far: how many keepers there were.
    attached: AtomicUsize,
    /// Operations carried out.
    operations: Mutex<Vec<String>>,
    /// Set: a rollback says that it began and waits for leave to go on.
    gate: Mutex<Option<(Sender<()>, Receiver<()>)>>,
    /// Set: attaching is refused.
    refuse: bool,
    /// What has become of images that are written, which never ends by itself.
    persisting: Arc<(Mutex<Vec<String>>, Condvar)>,
}

struct Fake {
    script: Arc<Script>,
    names: Vec<String>,
    alive: bool,
}

fn report(outcome: Outcome) -> Report {
    Report {
        outcome,
        stop_us: 1,
        total_us: 2,
        phases: BTreeMap::from([("stop".to_owned(), 1)]),
        processes: 1,
        threads: 1,
        dirty_pages: 0,
        copied_bytes: 0,
        header_bytes: 0,
        killed: 0,
        revived: 0,
        reset_connections: 0,
        files: Default::default(),
        refused: None,
    }
}

fn refusal() -> Refusal {
    Refusal {
        object: "fd 7".into(),
        holder: "pid 12".into(),
        remedy: "close it".into(),
    }
}

impl Operations for Fake {
    fn checkpoint(
        &mut self,
        name: &str,
        _: &FileOptions,
        _: KeepOptions,
    ) -> Result<Report, Failure> {
        if name == "refused" {
            return Err(Failure::Refused { refusal: refusal() });
        }
        self.script
            .operations
            .lock()
            .unwrap()
            .push(format!("checkpoint {name}"));
        self.names.push(name.to_owned());
        Ok(report(Outcome::Checkpointed))
    }

    fn rollback(&mut self, name: &str, _: bool) -> Result<Report, Failure> {
        if let Some((begun, go_on)) = &*self.script.gate.lock().unwrap() {
            begun.send(()).unwrap();
            let _ = go_on.recv();
        }
        self.script
            .operations
            .lock()
            .unwrap()
            .push(format!("rollback {name}"));
        match name {
            "lost" => {
                self.alive = false;
                Err(Failure::Lost {
                    message: "killed".into(),
                })
            }
            "panic" => panic!("as the test asked"),
            _ => Ok(report(Outcome::RolledBack)),
        }
    }

    fn diff(&mut self, _: &str) -> Result<Vec<Change>, Failure> {
        Ok(Vec::new())
    }

    fn move_out(&mut self, _: &Path, _: Encoding, _: &FileOptions) -> Result<Summary, Failure> {
        self.alive = false;
        Ok(Summary::default())
    }

    fn inspect(&self, _: &str) -> Result<Inspection, Failure> {
        Ok(Inspection::default())
    }

    fn persist(&mut self, name: &str, _: &Path, _: Options) -> Result<Work, Failure> {
        // Goes on until it is cancelled, as soon as it has begun.
        let progress = Arc::new(Progress::default());
        let (begun, running) = (self.script.persisting.clone(), Arc::clone(&progress));
        let name = name.to_owned();
        Ok(Work {
            progress,
            run: Box::new(move || {
                begun.0.lock().unwrap().push(name);
                begun.1.notify_all();
                loop {
                    if let Some(why) = running.cancelled() {
                        begun.0.lock().unwrap().push(why.to_string());
                        begun.1.notify_all();
                        return Err(Failure::Error {
                            message: why.to_string(),
                        });
                    }
                    thread::yield_now();
                }
            }),
        })
    }

    fn restore(&mut self, name: &str, _: (&Path, bool), _: bool) -> Result<Report, Failure> {
        self.names.push(name.to_owned());
        Ok(report(Outcome::Restored))
    }

    fn prepare_again(&mut self, _: &str) -> Result<[Option<Stream>; 3], Failure> {
        Ok([const { None }; 3])
    }

    fn make_again(&mut self, _: &str, _: i32, _: bool) -> Result<Report, Failure> {
        Ok(report(Outcome::RolledBack))
    }

    fn end_with_container(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    fn checkpoints(&self) -> Vec<CheckpointInfo> {
        let info = |name: &String| CheckpointInfo {
            parent: None,
            current: false,
            pinned: false,
            ended: false,
            page_bytes: 0,
            name: name.clone(),
            taken_at: 1.5,
            kinds: BTreeMap::from([("pipe".to_owned(), 64)]),
            header_bytes: 64,
            resident_bytes: 4096,
            copied_bytes: 0,
            file_bytes: 0,
            durability: Default::default(),
        };
        self.names.iter().map(info).collect()
    }

    fn release(&mut self, name: Option<&str>) -> Result<(), Failure> {
        self.names
            .retain(|held| name.is_some_and(|name| name != held));
        Ok(())
    }

    fn held(&self) -> usize {
        self.names.len()
    }

    fn is_alive(&self) -> bool {
        self.alive
    }

    fn can_come_back(&self) -> bool {
        false
    }

    fn root(&self) -> i32 {
        0
    }

    fn collect_deaths(&mut self) {}
}

/// A process to keep, killed at the end.
struct Root(Child);

impl Root {
    fn new() -> Root {
        Root(Command::new("sleep").arg("1000").spawn().unwrap())
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

type Keeper = thread::JoinHandle<Result<(), Error>>;

/// A root directory, a process and keepers that run on threads of this program.
struct Setting {
    root: tempfile::TempDir,
    process: Root,
    script: Arc<Script>,
    keepers: Mutex<Vec<Keeper>>,
}

impl Setting {
    fn new(script: Script) -> Setting {
        Setting {
            root: tempfile::tempdir().unwrap(),
            process: Root::new(),
            script: Arc::new(script),
            keepers: Mutex::default(),
        }
    }

    fn identity(&self) -> Identity {
        Identity::of(self.process.0.id() as i32).unwrap()
    }

    fn directory(&self) -> StateDirectory {
        StateDirectory::new(self.root.path(), "key", "web")
    }

    fn path(&self) -> std::path::PathBuf {
        self.root.path().join(".keepers/key")
    }

    fn start(&self, locked: &Locked) -> Result<UnixStream, Error> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let lock = Locked::inherit(locked.share().unwrap());
        let (directory, script, root) =
            (self.directory(), Arc::clone(&self.script), self.identity());
        let keeper = move || {
            let attach = move || {
                script.attached.fetch_add(1, Ordering::SeqCst);
                match script.refuse {
                    true => Err(Failure::Refused { refusal: refusal() }),
                    false => Ok(Fake {
                        script,
                        names: Vec::new(),
                        alive: true,
                    }),
                }
            };
            serve(&directory, lock, theirs, root, attach)
        };
        self.keepers.lock().unwrap().push(thread::spawn(keeper));
        Ok(ours)
    }

    fn first(&self, name: &str) -> Result<Response, Error> {
        let request = Request::Checkpoint {
            name: name.to_owned(),
            files: FileOptions::default(),
            keep: KeepOptions::default(),
        };
        Client::ask_or_start_with(&self.directory(), |locked| self.start(locked), &request)
    }

    fn ask(&self, request: &Request) -> Result<Response, Error> {
        Client::ask(&self.directory(), request)
    }

    /// Waits for all keepers to end by themselves.
    fn ends(&self) -> Vec<Result<(), Error>> {
        let keepers = std::mem::take(&mut *self.keepers.lock().unwrap());
        keepers
            .into_iter()
            .map(|keeper| keeper.join().unwrap())
            .collect()
    }
}

fn rollback(name: &str) -> Request {
    Request::Rollback {
        name: name.to_owned(),
        verify: false,
    }
}

const RELEASE_ALL: Request = Request::Release { name: None };

#[test]
fn messages_survive_the_wire() {
    let requests = [
        Request::Checkpoint {
            name: "ä\n\"b\"".into(),
            files: FileOptions::default(),
            keep: KeepOptions {
                pin: true,
                most: Some(3),
            },
        },
        Request::Rollback {
            name: "x".into(),
            verify: true,
        },
        Request::Checkpoints,
        RELEASE_ALL,
    ];
    let responses = [
        Response::Done {
            report: report(Outcome::RolledBack),
        },
        Response::Released { left: 3 },
        Response::Checkpoints {
            checkpoints: Vec::new(),
        },
        Response::Failure(Failure::Refused { refusal: refusal() }),
        Response::Failure(Failure::Lost {
            message: "x".into(),
        }),
        Response::Failure(Failure::Error {
            message: "y".into(),
        }),
    ];
    let mut wire = Vec::new();
    requests
        .iter()
        .for_each(|request| send(&mut wire, request).unwrap());
    responses
        .iter()
        .for_each(|response| send(&mut wire, response).unwrap());
    let mut wire = wire.as_slice();
    for request in requests {
        assert_eq!(receive::<Request>(&mut wire).unwrap(), Some(request));
    }
    for response in responses {
        assert_eq!(receive::<Response>(&mut wire).unwrap(), Some(response));
    }
    assert!(receive::<Request>(&mut wire).unwrap().is_none());
}

#[test]
fn broken_lines_are_errors() {
    use std::io::ErrorKind::{InvalidData, UnexpectedEof};
    let kind = |mut line: &[u8]| receive::<Request>(&mut line).unwrap_err().kind();
    assert_eq!(kind(b"{\"request\":\"checkpoints\"}"), UnexpectedEof);
    assert_eq!(kind(b"{\"request\":\"dance\"}\n"), InvalidData);
    assert_eq!(kind(b"\n"), UnexpectedEof);
    assert_eq!(kind(&vec![b' '; LINE_LIMIT as usize + 1]), InvalidData);
}

#[test]
fn keeper_serves_until_the_last_release() {
    let setting = Setting::new(Script::default());
    assert!(matches!(
        setting.ask(&rollback("a")),
        Err(Error::NoKeeper { .. })
    ));
    assert!(matches!(setting.first("a").unwrap(), Response::Done { .. }));
    assert!(matches!(setting.first("b").unwrap(), Response::Done { .. }));
    assert!(matches!(
        setting.ask(&rollback("a")).unwrap(),
        Response::Done { .. }
    ));
    let release = Request::Release {
        name: Some("a".into()),
    };
    assert_eq!(
        setting.ask(&release).unwrap(),
        Response::Released { left: 1 }
    );
    match setting.ask(&Request::Checkpoints).unwrap() {
        Response::Checkpoints { checkpoints } => assert_eq!(checkpoints[0].name, "b"),
        other => panic!("{other:?}"),
    }
    assert_eq!(
        setting.ask(&RELEASE_ALL).unwrap(),
        Response::Released { left: 0 }
    );
    // Whoever has the answer finds no keeper.
    assert!(!setting.path().exists());
    assert!(matches!(
        setting.ask(&RELEASE_ALL),
        Err(Error::NoKeeper { .. })
    ));
    assert!(setting.ends().into_iter().all(|end| end.is_ok()));
}

#[test]
fn a_refused_first_checkpoint_leaves_no_keeper() {
    let setting = Setting::new(Script::default());
    let refused = Response::Failure(Failure::Refused { refusal: refusal() });
    assert_eq!(setting.first("refused").unwrap(), refused);
    assert!(!setting.path().exists());
    assert_eq!(setting.ends().len(), 1);
    // A refusal to attach as well.
    let setting = Setting::new(Script {
        refuse: true,
        ..Script::default()
    });
    assert_eq!(setting.first("a").unwrap(), refused);
    assert!(!setting.path().exists());
    assert!(setting.ends()[0].is_err());
}

#[test]
fn racing_first_checkpoints_start_one_keeper() {
    let setting = Setting::new(Script::default());
    thread::scope(|scope| {
        for number in 0..16 {
            let setting = &setting;
            scope.spawn(move || {
                let response = setting.first(&number.to_string()).unwrap();
                assert!(matches!(response, Response::Done { .. }), "{response:?}");
            });
        }
    });
    assert_eq!(setting.script.attached.load(Ordering::SeqCst), 1);
    assert_eq!(setting.script.operations.lock().unwrap().len(), 16);
    setting.ask(&RELEASE_ALL).unwrap();
    assert!(setting.ends().into_iter().all(|end| end.is_ok()));
}

#[test]
fn racing_starts_and_ends_lose_no_request() {
    let setting = Setting::new(Script::default());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let response = setting.first("a").unwrap();
                    assert!(matches!(response, Response::Done { .. }), "{response:?}");
                    match setting.ask(&RELEASE_ALL) {
                        Ok(Response::Released { .. }) | Err(Error::NoKeeper { .. }) => {}
                        other => panic!("{other:?}"),
                    }
                }
            });
        }
    });
    assert!(!setting.path().exists());
    assert!(setting.ends().into_iter().all(|end| end.is_ok()));
    assert_eq!(setting.script.operations.lock().unwrap().len(), 200);
}

#[test]
fn an_operation_outlives_its_client() {
    let (begun, is_begun) = channel();
    let (go_on, may_go_on) = channel();
    let gate = Mutex::new(Some((begun, may_go_on)));
    let setting = Setting::new(Script {
        gate,
        ..Script::default()
    });
    setting.first("a").unwrap();
    let Found::Keeper(mut stream) = setting.directory().connect().unwrap() else {
        panic!()
    };
    send(&mut stream, &Hello::new()).unwrap();
    send(&mut stream, &rollback("a")).unwrap();
    is_begun.recv().unwrap();
    drop(stream);
    drop(go_on);
    // Requests are carried out in order: the listing comes after the rollback.
    setting.ask(&Request::Checkpoints).unwrap();
    assert_eq!(
        *setting.script.operations.lock().unwrap(),
        ["checkpoint a", "rollback a"]
    );
    setting.ask(&RELEASE_ALL).unwrap();
    assert!(setting.ends()[0].is_ok());
}

/// Waits until the fake tree has told as much of the images that are written.
fn told(setting: &Setting, count: usize) -> Vec<String> {
    let (told, changed) = &*setting.script.persisting;
    let told = told.lock().unwrap();
    let told = changed.wait_while(told, |told| told.len() < count);
    told.unwrap().clone()
}

fn persist() -> Request {
    Request::Persist {
        name: "a".into(),
        to: "/nowhere".into(),
        encoding: Encoding::Plain,
        called: None,
        lend: false,
    }
}

#[test]
fn an_image_is_written_beside_other_requests_and_cancelled_with_its_client() {
    let setting = Setting::new(Script::default());
    setting.first("a").unwrap();
    let path = setting.path().join("socket");
    let mut client = UnixStream::connect(path).unwrap();
    send(&mut client, &Hello::new()).unwrap();
    send(&mut client, &persist()).unwrap();
    let mut reader = BufReader::new(client);
    receive::<Hello>(&mut reader).unwrap().unwrap();
    let progress = receive::<Response>(&mut reader).unwrap().unwrap();
    assert!(
        matches!(progress, Response::Progress { .. }),
        "{progress:?}"
    );
    assert_eq!(told(&setting, 1), ["a"]);
    let answer = setting.ask(&rollback("a")).unwrap();
    assert!(matches!(answer, Response::Done { .. }), "{answer:?}");
    drop(reader);
    assert_eq!(told(&setting, 2)[1], "nobody waits for it any more");
    setting.ask(&RELEASE_ALL).unwrap();
    setting.ends().into_iter().for_each(|end| end.unwrap());
}

#[test]
fn a_keeper_that_ends_cancels_what_it_writes_and_says_so() {
    let setting = Setting::new(Script::default());
    setting.first("a").unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| setting.ask(&persist()).unwrap());
        told(&setting, 1);
        setting.ask(&RELEASE_ALL).unwrap();
        let answer = waiting.join().unwrap();
        let message = "the keeper has ended".to_owned();
        assert_eq!(answer, Response::Failure(Failure::Error { message }));
    });
    setting.ends().into_iter().for_each(|end| end.unwrap());
}

#[test]
fn a_first_client_that_says_nothing_leaves_no_keeper() {
    let setting = Setting::new(Script::default());
    let locked = setting.directory().lock().unwrap();
    let stream = setting.start(&locked).unwrap();
    drop(locked);
    drop(stream);
    assert!(setting.ends()[0].is_ok());
    assert!(!setting.path().exists());
}

#[test]
fn keeper_ends_with_the_container() {
    let mut setting = Setting::new(Script::default());
    setting.first("a").unwrap();
    setting.process.0.kill().unwrap();
    setting.process.0.wait().unwrap();
    assert!(setting.ends()[0].is_ok());
    assert!(!setting.path().exists());

    let setting = Setting::new(Script::default());
    setting.first("a").unwrap();
    let lost = Response::Failure(Failure::Lost {
        message: "killed".into(),
    });
    assert_eq!(setting.ask(&rollback("lost")).unwrap(), lost);
    assert!(!setting.path().exists());
    assert!(setting.ends()[0].is_ok());
}

#[test]
fn a_tracer_that_panics_is_told() {
    let setting = Setting::new(Script::default());
    setting.first("a").unwrap();
    assert!(matches!(
        setting.ask(&rollback("panic")),
        Err(Error::Broken { .. })
    ));
    assert!(setting.ends()[0].is_err());
    assert!(!setting.path().exists());
}

#[test]
fn what_a_killed_keeper_left_is_cleaned_up() {
    let setting = Setting::new(Script::default());
    let leave = || {
        let locked = setting.directory().lock().unwrap();
        drop(locked.listen(&setting.directory()).unwrap());
        assert!(setting.path().join("socket").exists());
    };
    leave();
    assert!(matches!(
        setting.ask(&rollback("a")),
        Err(Error::Died { .. })
    ));
    assert!(!setting.path().exists());
    leave();
    assert!(matches!(setting.first("a").unwrap(), Response::Done { .. }));
    setting.ask(&RELEASE_ALL).unwrap();
    assert!(setting.ends()[0].is_ok());
}

#[test]
fn taken_paths_are_named() {
    let setting = Setting::new(Script::default());
    let taken = |result: Result<Response, Error>| match result {
        Err(Error::Taken { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    drop(setting.directory().lock().unwrap());
    let socket = setting.path().join("socket");
    fs::write(&socket, "mine").unwrap();
    assert_eq!(taken(setting.first("a")), "not a socket");
    assert_eq!(taken(setting.ask(&RELEASE_ALL)), "not a socket");
    assert_eq!(fs::read_to_string(&socket).unwrap(), "mine");
    fs::remove_file(&socket).unwrap();

    let listener = UnixListener::bind(&socket).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"220 mail.example.org\r\n").unwrap();
            // Closed with bytes unread, the client would see a reset instead.
            BufReader::new(stream).read_to_end(&mut Vec::new()).unwrap();
        });
        assert_eq!(
            taken(setting.first("a")),
            "its listener does not speak our protocol"
        );
    });
    fs::remove_file(&socket).unwrap();
    fs::remove_dir(setting.path()).unwrap();

    fs::write(setting.path(), "mine").unwrap();
    assert_eq!(taken(setting.first("a")), "not a directory");
    assert_eq!(taken(setting.ask(&RELEASE_ALL)), "not a directory");
    fs::remove_file(setting.path()).unwrap();
    make_world_writable(setting.path().parent().unwrap());
    assert_eq!(
        taken(setting.first("a")),
        "a directory that others can write to"
    );
    assert_eq!(setting.script.attached.load(Ordering::SeqCst), 0);
}

fn make_world_writable(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
}

#[test]
fn another_version_is_named() {
    let setting = Setting::new(Script::default());
    setting.first("a").unwrap();
    let Found::Keeper(mut stream) = setting.directory().connect().unwrap() else {
        panic!()
    };
    send(
        &mut stream,
        &Hello {
            protocol: 99,
            program: "other".into(),
        },
    )
    .unwrap();
    let mut reader = BufReader::new(&stream);
    assert_eq!(receive::<Hello>(&mut reader).unwrap(), Some(Hello::new()));
    assert_eq!(receive::<Response>(&mut reader).unwrap(), None);
    setting.ask(&RELEASE_ALL).unwrap();
    assert!(setting.ends()[0].is_ok());
}

#[test]
fn socket_and_directory_are_roots_alone() {
    use std::os::unix::fs::MetadataExt;
    let setting = Setting::new(Script::default());
    setting.first("a").unwrap();
    assert_eq!(fs::metadata(setting.path()).unwrap().mode() & 0o7777, 0o700);
    assert_eq!(
        fs::metadata(setting.path().join("socket")).unwrap().mode() & 0o7777,
        0o600
    );
    setting.ask(&RELEASE_ALL).unwrap();
    assert!(setting.ends()[0].is_ok());
}
