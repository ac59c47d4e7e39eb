//! PostgreSQL, rolled back under load and checked by what a client from before sees.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

use crate::real_programs::rounds;
use crate::support::family::Family;
use crate::support::session::{DONE, Session, finish};
use crate::support::{skip, wait};

/// Where the newest version has its programs.
pub(crate) fn programs() -> Option<PathBuf> {
    let mut versions: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .filter(|directory| directory.join("postgres").exists())
        .collect();
    versions.sort();
    versions.pop()
}

/// A command as the user that may run a server, which root may not.
fn as_postgres(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=postgres", "--regid=postgres", "--clear-groups"])
        .arg(program)
        .current_dir("/");
    command
}

/// A server with a data directory of its own, in memory: this version rolls back no files.
struct Server {
    family: Family,
    directory: tempfile::TempDir,
}

impl Server {
    fn start(programs: &Path) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("snapback-postgresql-")
            .tempdir_in("/dev/shm")
            .expect("making a directory");
        let user = nix::unistd::User::from_name("postgres")
            .expect("looking for a user")
            .expect("the user of the package");
        nix::unistd::chown(directory.path(), Some(user.uid), Some(user.gid)).expect("chown");
        let data = directory.path().join("data");
        let mut make = as_postgres(&programs.join("initdb"));
        make.args(["--no-sync", "--auth=trust", "-D"]).arg(&data);
        finish(make).expect(0, "initdb");
        let log = File::create(directory.path().join("log")).expect("making a file");
        let family = Family::start(
            as_postgres(&programs.join("postgres"))
                .arg("-D")
                .arg(&data)
                .args(["-c", "listen_addresses=", "-c", "fsync=off"])
                .arg("-k")
                .arg(directory.path())
                .stdin(Stdio::null())
                .stdout(log.try_clone().expect("duplicating"))
                .stderr(log),
        );
        let server = Self { family, directory };
        wait::until("PostgreSQL answers", || {
            let mut client = Client::connect(server.directory.path());
            client.ask("select 1").as_deref() == Some("1")
        });
        server
    }

    fn pid(&self) -> i32 {
        self.family.pid()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

/// `psql`, a statement a line.
pub(crate) struct Client {
    psql: Child,
    statements: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Client {
    /// To the server whose socket is in the directory.
    pub(crate) fn connect(directory: &Path) -> Self {
        let mut psql = Command::new("psql")
            .args(["-U", "postgres", "-d", "postgres", "-qAtX", "-h"])
            .arg(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("starting psql");
        let statements = psql.stdin.take().expect("a pipe");
        let answers = BufReader::new(psql.stdout.take().expect("a pipe"));
        Self {
            psql,
            statements,
            answers,
        }
    }

    /// The answer, a line, or `None` if the connection is gone.
    pub(crate) fn ask(&mut self, statement: &str) -> Option<String> {
        writeln!(self.statements, "{statement};").ok()?;
        let mut line = String::new();
        let count = self.answers.read_line(&mut line).ok()?;
        (count > 0).then(|| line.trim_end().to_owned())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It may have ended with its connection.
        let _ = self.psql.kill();
        let _ = self.psql.wait();
    }
}

/// Clients that come after the checkpoint, and read until they are thrown out.
fn newcomers(directory: &Path) -> Vec<JoinHandle<u32>> {
    let clients: Vec<_> = (0..2)
        .map(|_| {
            let mut client = Client::connect(directory);
            assert_eq!(client.ask("select 1").as_deref(), Some("1"));
            client
        })
        .collect();
    let work = |mut client: Client| {
        move || {
            let mut answered = 0;
            while client
                .ask("select sum(a) from numbers where a % 7 = 3")
                .is_some()
            {
                answered += 1;
            }
            answered
        }
    };
    clients
        .into_iter()
        .map(|client| std::thread::spawn(work(client)))
        .collect()
}

#[test]
fn comes_back_under_load() {
    let Some(programs) = programs() else {
        skip!("no PostgreSQL");
    };
    let server = Server::start(&programs);
    let mut client = Client::connect(server.directory.path());
    let mut ask = |statement: &str| {
        client
            .ask(statement)
            .unwrap_or_else(|| panic!("the client from before is gone: {}", server.log()))
    };
    ask(
        "create unlogged table numbers as select g as a, md5(g::text) as b from generate_series(1, 20000) g; \
        create temp table own as select 42 as v; select v from own",
    );
    let sum = ask("select sum(a) from numbers");
    assert_eq!(sum, "200010000");

    let mut session = Session::new();
    session.checkpoint(server.pid());
    for round in 0..rounds().div_ceil(2) {
        // The session's own table is in memory of the process, and so is what it has set and prepared.
        assert_eq!(
            ask("update own set v = v + 1; select v from own"),
            "43",
            "round {round}"
        );
        ask("set search_path = nowhere; prepare later as select 1; select 1");
        let readers = newcomers(server.directory.path());
        assert_eq!(
            ask("select count(*) from pg_stat_activity where state = 'active' or state = 'idle'"),
            "3"
        );
        session.rollback(server.pid());
        for reader in readers {
            reader.join().expect("a reader that was thrown out");
        }
        assert_eq!(ask("select v from own"), "42", "round {round}");
        assert_eq!(
            ask("show search_path"),
            "\"$user\", public",
            "round {round}"
        );
        assert_eq!(
            ask("select count(*) from pg_prepared_statements"),
            "0",
            "round {round}"
        );
        assert_eq!(ask("select sum(a) from numbers"), sum, "round {round}");
        session.rollback(server.pid());
    }
    assert_eq!(
        ask("select count(*) from pg_stat_activity where backend_type = 'client backend'"),
        "1"
    );
    session.release(server.pid()).expect(DONE, "release");
    assert_eq!(ask("select v from own"), "42");
    let log = server.log();
    assert!(!log.contains("PANIC") && !log.contains("crash"), "{log}");
}
