//! Real programs, rolled back under load and checked by their own state.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::support::container::Containers;
use crate::support::family::Family;
use crate::support::fixture::{Fixture, real};
use crate::support::nginx::{self, Nginx};
use crate::support::numbers::{self, Holdings};
use crate::support::redis::{self, Client};
use crate::support::session::{DONE, Session, finish};
use crate::support::{skip, wait};

/// Rollbacks per program; `SNAPBACK_ROUNDS` overrides it.
pub(crate) fn rounds() -> u32 {
    std::env::var("SNAPBACK_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(100)
}

fn found(program: &str) -> bool {
    ["/usr/bin", "/usr/sbin", "/usr/local/bin"]
        .into_iter()
        .any(|directory| Path::new(directory).join(program).exists())
}

/// A program of `fixtures/real`: it works all the time, and is wrecked, rolled back and asked again and again.
#[track_caller]
fn busy_program(name: &str, command: Command) {
    let mut session = Session::new();
    let mut program = Fixture::launch(name, command);
    program.verify("before the checkpoint");
    session.checkpoint(program.pid());
    for round in 0..rounds() {
        program.mutate();
        if round == 0 {
            let answer = program.ask(b'v');
            assert!(
                answer.starts_with("FAIL "),
                "{name} is not wrecked: {answer}"
            );
        }
        session.rollback(program.pid());
        program.verify(&format!("after rollback {round}"));
        if round % 10 == 0 {
            program.run_on();
            program.verify("after it ran on");
        }
    }
    session.release(program.pid()).expect(DONE, "release");
    program.verify("after the release");
}

#[test]
fn python() {
    if !found("python3") {
        skip!("no python3");
    }
    let mut command = Command::new("python3");
    command.arg(real("bank.py"));
    busy_program("bank.py", command);
}

#[test]
fn node() {
    if !found("node") {
        skip!("no node");
    }
    let mut command = Command::new("node");
    command.arg(real("bank.js"));
    busy_program("bank.js", command);
}

#[test]
fn java() {
    if !found("javac") {
        skip!("no javac");
    }
    let classes = tempfile::tempdir().expect("making a directory");
    let mut compile = Command::new("javac");
    compile.arg("-d").arg(classes.path()).arg(real("Bank.java"));
    finish(compile).expect(0, "javac");
    let mut command = Command::new("java");
    command
        .args(["-XX:-UsePerfData", "-Xmx256m", "-cp"])
        .arg(classes.path())
        .arg("Bank");
    busy_program("Bank.java", command);
}

/// Clients that write as fast as they are answered, and connect anew whenever they are thrown out.
struct Load {
    stop: std::sync::Arc<AtomicBool>,
    requests: std::sync::Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    fn start(socket: &Path, clients: usize) -> Self {
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let requests = std::sync::Arc::new(AtomicU64::new(0));
        let threads = (0..clients)
            .map(|number| {
                let (stop, requests, socket) = (stop.clone(), requests.clone(), socket.to_owned());
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let Ok(mut client) = Client::connect(&socket) else {
                            continue;
                        };
                        for key in 0_u64.. {
                            if stop.load(Ordering::Relaxed)
                                || client
                                    .ask(&format!("SET load:{number}:{key} {key}"))
                                    .is_err()
                            {
                                break;
                            }
                            requests.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                })
            })
            .collect();
        Self {
            stop,
            requests,
            threads,
        }
    }

    /// Waits until so many more requests were answered.
    fn progress(&self, count: u64) {
        let from = self.requests.load(Ordering::Relaxed);
        wait::until("the load makes progress", || {
            self.requests.load(Ordering::Relaxed) >= from + count
        });
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// What must stay flat: of the keepers and of the server.
fn survey(session: &Session, server: i32) -> Vec<(i32, Holdings)> {
    let mut pids = session.keepers();
    pids.push(server);
    pids.into_iter()
        .filter_map(|pid| Some((pid, numbers::holdings(pid)?)))
        .collect()
}

#[track_caller]
fn assert_flat(server: i32, before: &[(i32, Holdings)], after: &[(i32, Holdings)]) {
    assert_eq!(before.len(), after.len(), "{before:?} {after:?}");
    for ((pid, first), (same, last)) in before.iter().zip(after) {
        assert_eq!(pid, same, "{before:?} {after:?}");
        let counts = |it: &Holdings| (it.descriptors, it.threads);
        assert_eq!(counts(first), counts(last), "of {pid}: {first:?} {last:?}");
        // The C library keeps the stack and arena of each thread there were at once, two mappings each, for the next.
        let spare = if *pid == server { 0 } else { 8 };
        assert!(
            first.mappings.abs_diff(last.mappings) <= spare,
            "mappings of {pid}: {first:?} {last:?}"
        );
        assert!(
            last.resident_kib <= first.resident_kib + first.resident_kib / 10 + 4096,
            "resident memory of {pid}: {first:?} {last:?}"
        );
    }
}

/// The run that every Redis has to pass, whoever started it. `target` is an ID or `--pid` and a PID; `files` are options of
/// the checkpoint.
#[track_caller]
fn redis_run(session: &Session, target: &[&str], files: &[&str], pid: i32, socket: &Path) {
    let operate = |verb: &str, options: &[&str]| {
        let arguments: Vec<&str> = [&[verb, "--json"][..], options, target].concat();
        session.run(&arguments).expect(DONE, verb)
    };
    let mut client = Client::wait_for(socket);
    let digest = redis::fill(&mut client);
    let size = client.must("DBSIZE");
    let id = client.must("CLIENT ID");

    operate("checkpoint", files);
    let mut before = None;
    for round in 0..rounds() {
        // Wrecked, by itself and by newcomers; every third time while they are at it.
        let mut late = Client::connect(socket).expect("connecting");
        late.must("FLUSHALL");
        late.must("CONFIG SET maxmemory 200mb");
        late.must("DEBUG POPULATE 2000 other 100");
        client.must(&format!("SET round {round}"));
        client.must("CONFIG SET maxclients 50");
        let load = (round % 3 == 0).then(|| Load::start(socket, 4));
        if let Some(load) = &load {
            load.progress(200);
        }
        operate("rollback", &["--verify"]);
        if let Some(load) = load {
            // It goes on with connections of its own.
            load.progress(50);
            drop(load);
            operate("rollback", &["--verify"]);
        }

        assert_eq!(client.must("DBSIZE"), size, "round {round}");
        assert_eq!(client.must("CLIENT ID"), id, "round {round}");
        assert_eq!(client.must("DEBUG DIGEST"), digest, "round {round}");
        assert_eq!(client.must("CONFIG GET maxmemory"), "maxmemory\n1073741824");
        let clients = client.must("CLIENT LIST");
        assert_eq!(
            clients.trim().lines().count(),
            1,
            "round {round}: {clients}"
        );
        assert!(
            late.ask("PING").is_err(),
            "round {round}: a late client is still served"
        );
        if round == 5 {
            before = Some(survey(session, pid));
        }
    }
    if let Some(before) = before {
        assert_flat(pid, &before, &survey(session, pid));
    }
    let release: Vec<&str> = [&["release", "--all"][..], target].concat();
    session.run(&release).expect(DONE, "release");
    assert_eq!(client.must("DEBUG DIGEST"), digest);
}

#[test]
fn redis_from_a_shell() {
    if !found("redis-server") {
        skip!("no redis-server");
    }
    let session = Session::new();
    let directory = tempfile::tempdir().expect("making a directory");
    let socket = directory.path().join("redis.sock");
    let log = File::create(directory.path().join("log")).expect("making a file");
    let server = Family::start(
        redis::server(&socket)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("duplicating"))
            .stderr(log),
    );
    let pid = server.pid();
    redis_run(&session, &["--pid", &pid.to_string()], &[], pid, &socket);
}

/// An ID no other test uses: cgroups are named after it.
fn unique(name: &str) -> String {
    format!("{name}-{}", std::process::id())
}

fn redis_bundle(containers: &Containers) -> (PathBuf, PathBuf) {
    let bundle = containers.bundle("bundle", &["redis", "--port", "0"]);
    let socket = bundle.join("rootfs/run/redis.sock");
    (bundle, socket)
}

#[test]
fn redis_in_our_own_run() {
    if !found("redis-server") {
        skip!("no redis-server");
    }
    let containers = Containers::new();
    let (bundle, _) = redis_bundle(&containers);
    let id = unique("redis");
    let pid = containers.start_with_layer(&id, &bundle);
    let socket = PathBuf::from(format!("/proc/{pid}/root/run/redis.sock"));
    redis_run(&containers.session, &[&id], &[], pid, &socket);
}

/// A container of runc's, gone when this is.
struct Runc {
    root: PathBuf,
    id: String,
}

impl Runc {
    fn start(bundle: &Path, scratch: &Path, id: String) -> (Self, i32) {
        let root = scratch.join("runc");
        let pid_file = scratch.join("runc.pid");
        let log = File::create(scratch.join("runc.log")).expect("making a file");
        let started = Command::new("runc")
            .arg("--root")
            .arg(&root)
            .args(["run", "--detach", "--pid-file"])
            .arg(&pid_file)
            .arg("--bundle")
            .arg(bundle)
            .arg(&id)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("duplicating"))
            .stderr(log)
            .status()
            .expect("starting runc");
        let said = fs::read_to_string(scratch.join("runc.log")).unwrap_or_default();
        let container = Self { root, id };
        assert!(started.success(), "runc run: {said}");
        let pid = fs::read_to_string(pid_file).expect("a PID file");
        (container, pid.parse().expect("a PID"))
    }
}

impl Drop for Runc {
    fn drop(&mut self) {
        let _ = Command::new("runc")
            .arg("--root")
            .arg(&self.root)
            .args(["delete", "--force", &self.id])
            .status();
    }
}

#[test]
fn redis_that_runc_started() {
    if !found("redis-server") || !found("runc") {
        skip!("no redis-server or no runc");
    }
    let containers = Containers::new();
    let (bundle, socket) = redis_bundle(&containers);
    let (_container, pid) =
        Runc::start(&bundle, containers.session.scratch(), unique("runc-redis"));
    redis_run(
        &containers.session,
        &["--pid", &pid.to_string()],
        &["--no-files"],
        pid,
        &socket,
    );
}

/// A connection to nginx that is kept alive.
struct Browser(BufReader<TcpStream>);

impl Browser {
    fn connect(port: u16) -> std::io::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn get(&mut self, path: &str) -> std::io::Result<String> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n");
        self.0.get_mut().write_all(request.as_bytes())?;
        let mut length = 0;
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().expect("a length");
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// What stub_status counts: accepted connections, handled ones, requests.
    fn counted(&mut self) -> std::io::Result<Vec<u64>> {
        let body = self.get("/status")?;
        let line = body.lines().nth(2).unwrap_or_default();
        Ok(line
            .split_whitespace()
            .map(|word| word.parse().expect("a number"))
            .collect())
    }
}

#[test]
fn nginx() {
    if !nginx::is_there() {
        skip!("no nginx");
    }
    let page = "x".repeat(50_000);
    let Nginx { master, port, .. } = &Nginx::start(
        &page,
        "keepalive_timeout 1h; keepalive_requests 1000000;",
        "location /status { stub_status; }",
    );
    let port = *port;
    let mut browser = None;
    wait::until("nginx answers", || {
        browser = Browser::connect(port).ok();
        browser
            .as_mut()
            .is_some_and(|browser| browser.get("/page").is_ok())
    });
    let mut browser = browser.expect("connected");
    wait::until("both workers run", || master.members().len() == 3);
    let before = browser.counted().expect("a count");

    let mut session = Session::new();
    session.checkpoint(master.pid());
    for round in 0..rounds() {
        let load: Vec<_> = (0..4)
            .map(|_| {
                std::thread::spawn(move || {
                    // Until it is thrown out by the rollback.
                    let Ok(mut browser) = Browser::connect(port) else {
                        return 0;
                    };
                    (0_u32..)
                        .take_while(|_| browser.get("/page").is_ok_and(|body| body.len() == 50_000))
                        .count()
                })
            })
            .collect();
        for _ in 0..20 {
            assert_eq!(browser.get("/page").expect("a page"), page);
        }
        session.rollback(master.pid());
        for thread in load {
            thread.join().expect("a client that was thrown out");
        }
        // Quiet now: the counters of the checkpoint, and this one request more.
        session.rollback(master.pid());
        let after = browser.counted().expect("a count over the old connection");
        assert_eq!(after[0], before[0], "round {round}: accepted connections");
        assert_eq!(after[2], before[2] + 1, "round {round}: requests");
        assert_eq!(browser.get("/page").expect("a page"), page, "round {round}");
        let mut other = Browser::connect(port).expect("a new connection");
        assert_eq!(other.get("/page").expect("a page"), page, "round {round}");
    }
}
