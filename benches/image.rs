//! Redis in a container on tmpfs: written to disk, restored, and forked, to its first answer.
//!
//! `SNAPBACK_BENCH_MB=100,1000` are the sizes, in MB of data; 100 if it is not set.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::container::{Container, id, must, wait_for};
use support::{judged, middle, ms, table};

const ROUNDS: usize = 5;

fn main() {
    if Command::new("redis-server").arg("-v").output().is_err() {
        println!("SKIP benches/image: no redis-server");
        assert!(std::env::var_os("SNAPBACK_STRICT").is_none_or(|value| value != "1"));
        return;
    }
    let sizes = std::env::var("SNAPBACK_BENCH_MB").unwrap_or_else(|_| "100".into());
    let sizes = sizes.split(',').map(|size| size.parse().expect("MB"));
    let all: Vec<Rows> = sizes.map(one).collect();
    let rows = |of: fn(&Rows) -> Vec<String>| all.iter().map(of).collect::<Vec<_>>();
    table(
        "Redis in a container, to disk and back (medians of 5)",
        &[
            "MB of data",
            "checkpoint's stop ms",
            "persist ms",
            "cp ms",
            "ratio",
            "create ms",
            "restore to PONG ms",
            "fork to PONG ms",
            "of 20 ms",
        ],
        &rows(|rows| rows.times.clone()),
    );
    table(
        "Where a restore spends it: phases of 1 ms and more",
        &["MB of data", "restore", "fork"],
        &rows(|rows| rows.phases.clone()),
    );
    let criu = Command::new("criu").arg("check").output();
    match criu.map(|output| output.status.success()) {
        Ok(true) => println!("NOT MEASURED against the criu that is here"),
        Ok(false) => println!("SKIP comparison with CRIU: `criu check` fails on this kernel"),
        Err(error) => println!("SKIP comparison with CRIU: criu: {error}"),
    }
}

/// What was measured with one size.
struct Rows {
    times: Vec<String>,
    phases: Vec<String>,
}

fn one(megabytes: u64) -> Rows {
    let directory = tempfile::Builder::new()
        .prefix("snapback-bench-")
        .tempdir_in("/dev/shm")
        .expect("making a directory");
    let first = Container::start_in(directory.path(), &["redis", "--port", "0"]);
    let answers = |pid| Connection::open(pid).is_ok_and(|mut redis| redis.ask("PING") == "+PONG");
    wait_for("Redis", || answers(first.pid));
    let mut redis = Connection::open(first.pid).expect("connecting");
    redis.ask(&format!("DEBUG POPULATE {} key 1000", megabytes * 900));
    let digest = redis.ask("DEBUG DIGEST");

    let mut stops = Vec::new();
    for _ in 0..ROUNDS {
        let report = first.json(&["checkpoint", "--json"]);
        stops.push(report["stop_us"].as_f64().expect("stop_us"));
        first.ask(&["release", "--all"]);
    }
    first.ask(&["checkpoint"]);
    let (image, copy) = (
        directory.path().join("image"),
        directory.path().join("copy"),
    );
    let (mut written, mut copied) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        for path in [&image, &copy] {
            // Not there in the first round.
            let _ = std::fs::remove_dir_all(path);
        }
        let path = image.to_str().expect("a path in UTF-8");
        written.push(timed(|| {
            drop(first.ask(&["persist", "--image-path", path]))
        }));
        copied.push(timed(|| {
            drop(must(Command::new("cp").arg("-r").args([&image, &copy])));
        }));
    }
    std::fs::remove_dir_all(&copy).expect("removing a copy");
    let others = Others {
        first: &first,
        place: directory.path(),
        digest: &digest,
    };
    let bundle = first.place.join("bundle");
    let of_bundle = ["--bundle".as_ref(), bundle.as_os_str()];
    let create = middle(
        (0..ROUNDS)
            .map(|_| others.make("create", &of_bundle, false).0)
            .collect(),
    );
    let of_image = ["--detach", "--json", "--image-path"].map(str::as_ref);
    let of_image = [&of_image[..], &[image.as_os_str()], &of_bundle].concat();
    let restored = others.repeated("restore", &of_image);
    let name = id();
    let of_first = ["--detach".as_ref(), "--json".as_ref(), name.as_ref()];
    let forked = others.repeated("fork", &of_first);
    let (written, copied) = (middle(written), middle(copied));
    Rows {
        times: vec![
            megabytes.to_string(),
            ms(middle(stops)),
            ms(written),
            ms(copied),
            judged(written / copied, 2.0),
            ms(create),
            ms(restored.0),
            ms(forked.0),
            match megabytes {
                100 => judged(forked.0 / 20_000.0, 1.0),
                _ => "-".into(),
            },
        ],
        phases: vec![megabytes.to_string(), restored.1, forked.1],
    }
}

/// Containers that are made of the first.
struct Others<'o> {
    first: &'o Container,
    place: &'o Path,
    digest: &'o str,
}

impl Others<'_> {
    /// The median time, and what it was spent on in the last round.
    fn repeated(&self, verb: &str, arguments: &[&std::ffi::OsStr]) -> (f64, String) {
        let mut phases = String::new();
        let times = (0..ROUNDS).map(|_| {
            let (time, told) = self.make(verb, arguments, true);
            phases = told;
            time
        });
        let time = middle(times.collect());
        (time, phases)
    }

    /// Makes a container, asks the Redis in it, and ends it.
    fn make(&self, verb: &str, arguments: &[&std::ffi::OsStr], asks: bool) -> (f64, String) {
        let (layer, pid_file) = (self.place.join("layer"), self.place.join("pid"));
        let said = self.place.join("said");
        std::fs::create_dir_all(&layer).expect("making a directory");
        let name = format!("{}-other", id());
        let mut command = self.first.command();
        command
            .arg(verb)
            .arg(format!("--overlay={}", layer.display()));
        command
            .arg("--pid-file")
            .arg(&pid_file)
            .args(arguments)
            .arg(&name);
        // What stays with the program must not be ours.
        let output = std::fs::File::create(&said).expect("making a file");
        command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(Stdio::null());
        let mut redis = None;
        let took = timed(|| {
            assert!(
                command.status().expect("starting snapback").success(),
                "{verb}"
            );
            if asks {
                let pid = std::fs::read_to_string(&pid_file).expect("a PID");
                let mut opened =
                    Connection::open(pid.trim().parse().expect("a PID")).expect("Redis");
                assert_eq!(opened.ask("PING"), "+PONG");
                redis = Some(opened);
            }
        });
        if let Some(mut redis) = redis {
            assert_eq!(redis.ask("DEBUG DIGEST"), self.digest, "{verb}");
        }
        must(self.first.command().args(["delete", "--force", &name]));
        std::fs::remove_dir_all(&layer).expect("removing a layer");
        let said = std::fs::read_to_string(&said).expect("a report");
        (took, phases(&said))
    }
}

/// The phases of a report that took at least a millisecond.
fn phases(said: &str) -> String {
    let report = said.find("{\n").map(|at| &said[at..]).unwrap_or_default();
    let report: serde_json::Value = serde_json::from_str(report).unwrap_or_default();
    let phases = report["phases"].as_object().cloned().unwrap_or_default();
    let long = phases.iter().filter_map(|(name, time)| {
        let time = time.as_f64().filter(|time| *time >= 1000.0)?;
        Some(format!("{name} {:.0}", time / 1000.0))
    });
    long.collect::<Vec<_>>().join(", ")
}

/// A connection that speaks as much of Redis's protocol as is needed here.
struct Connection(BufReader<UnixStream>);

impl Connection {
    /// To the Redis in the container of which this is the init.
    fn open(pid: i32) -> std::io::Result<Connection> {
        let path = PathBuf::from(format!("/proc/{pid}/root/run/redis.sock"));
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        Ok(Connection(BufReader::new(stream)))
    }

    /// Gives an inline command; returns its answer, which must be one line.
    fn ask(&mut self, command: &str) -> String {
        let command = format!("{command}\r\n");
        self.0
            .get_mut()
            .write_all(command.as_bytes())
            .expect("asking Redis");
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer of Redis");
        line.trim_end().to_owned()
    }
}

fn timed(work: impl FnOnce()) -> f64 {
    let began = Instant::now();
    work();
    began.elapsed().as_secs_f64() * 1e6
}
