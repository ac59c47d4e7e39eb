//! Redis with 100 MB of data, through the command line: rollback with process start included, share of the headers,
//! requests per second with a rollback every 100 ms.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::{judged, middle, ms, table};

fn main() {
    let Ok(redis) = Redis::start() else {
        println!("SKIP benches/redis: no redis-server");
        assert!(std::env::var_os("SNAPBACK_STRICT").is_none_or(|value| value != "1"));
        return;
    };
    redis.command_line();
    redis.steady_state();
    redis.snapback(&["release", "--all"]);
}

struct Redis {
    child: Child,
    port: u16,
    root: PathBuf,
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

/// A connection that speaks as much of Redis's protocol as is needed here.
struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open(port: u16) -> std::io::Result<Connection> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        Ok(Connection(BufReader::new(stream)))
    }

    /// Gives an inline command; returns its answer, of which arrays are not understood.
    fn ask(&mut self, command: &str) -> std::io::Result<String> {
        self.0
            .get_mut()
            .write_all(format!("{command}\r\n").as_bytes())?;
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::ConnectionReset.into());
        }
        let length = line
            .strip_prefix('$')
            .and_then(|number| number.trim().parse::<usize>().ok());
        let Some(length) = length else {
            return Ok(line.trim_end().to_owned());
        };
        let mut value = vec![0; length + 2];
        self.0.read_exact(&mut value)?;
        value.truncate(length);
        Ok(String::from_utf8_lossy(&value).into_owned())
    }
}

impl Redis {
    fn start() -> std::io::Result<Redis> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let root = std::env::temp_dir().join(format!("snapback-bench-{}", std::process::id()));
        let child = Command::new("redis-server")
            .args([
                "--save",
                "",
                "--bind",
                "127.0.0.1",
                "--enable-debug-command",
                "yes",
            ])
            .args(["--port", &port.to_string()])
            .stdout(Stdio::null())
            // As for the other programs: not a file of ours.
            .stderr(Stdio::null())
            .spawn()?;
        let redis = Redis { child, port, root };
        let mut connection = (0..1000)
            .find_map(|_| {
                let connection = Connection::open(port);
                // Nothing tells when it listens but trying.
                connection
                    .inspect_err(|_| std::thread::sleep(Duration::from_millis(10)))
                    .ok()
            })
            .expect("Redis does not listen");
        connection.ask("DEBUG POPULATE 90000 key 1000")?;
        Ok(redis)
    }

    fn snapback(&self, verb: &[&str]) -> Output {
        let output = Command::new(env!("CARGO_BIN_EXE_snapback"))
            .arg("--root")
            .arg(&self.root)
            .args(verb)
            .args(["--pid", &self.child.id().to_string()])
            .output()
            .expect("running snapback");
        assert!(output.status.success(), "{verb:?}: {output:?}");
        output
    }

    fn json(&self, verb: &[&str]) -> serde_json::Value {
        serde_json::from_slice(&self.snapback(&[verb, &["--json"]].concat()).stdout).expect("JSON")
    }

    fn command_line(&self) {
        let mut before = Connection::open(self.port).expect("connecting");
        let digest = before.ask("DEBUG DIGEST").expect("a digest");
        let checkpoint = self.json(&["checkpoint"]);
        let (mut outside, mut inside, mut stops) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..100 {
            before
                .ask(&format!("SET key:{round} changed"))
                .expect("SET");
            before
                .ask("DEBUG POPULATE 200 more 1000")
                .expect("POPULATE");
            let began = Instant::now();
            let report = self.json(&["rollback"]);
            outside.push(began.elapsed().as_secs_f64() * 1e6);
            inside.push(report["total_us"].as_u64().expect("total_us") as f64);
            stops.push(report["stop_us"].as_u64().expect("stop_us") as f64);
        }
        assert_eq!(before.ask("DEBUG DIGEST").expect("a digest"), digest);
        let bare = middle(
            (0..100)
                .map(|_| {
                    let began = Instant::now();
                    let ended = Command::new("/bin/true").status();
                    assert!(ended.is_ok_and(|status| status.success()));
                    began.elapsed().as_secs_f64() * 1e6
                })
                .collect(),
        );
        let outside = middle(outside);
        let listed = self.json(&["checkpoints"]);
        let info = &listed["checkpoints"][0];
        let number = |name: &str| info[name].as_u64().unwrap_or_else(|| panic!("no {name}")) as f64;
        let share = number("header_bytes") / number("resident_bytes") * 100.0;
        let row = |name: &str, value: String| vec![name.to_owned(), value];
        let rows = [
            row(
                "rollback by the command line, process start included, ms",
                ms(outside),
            ),
            row("of 5 ms", judged(outside / 5000.0, 1.0)),
            row("of that, starting /bin/true, ms", ms(bare)),
            row("of that, the keeper's work, ms", ms(middle(inside))),
            row("of that, stop window, ms", ms(middle(stops))),
            row(
                "first checkpoint's stop window, ms",
                ms(checkpoint["stop_us"].as_u64().unwrap_or(0) as f64),
            ),
            row(
                "resident memory, MiB",
                format!("{:.1}", number("resident_bytes") / 1048576.0),
            ),
            row(
                "headers, KiB",
                format!("{:.1}", number("header_bytes") / 1024.0),
            ),
            row("headers in % of resident memory", judged(share, 1.0)),
        ];
        table(
            "Redis with 100 MB of data (medians of 100)",
            &["what", "value"],
            &rows,
        );
    }

    /// Requests per second of four clients, one request at a time each, with and without rollbacks in between.
    fn steady_state(&self) {
        let without = self.load(None);
        let with = self.load(Some(Duration::from_millis(100)));
        let rows = [
            vec![
                "none".to_owned(),
                format!("{without:.0}"),
                "1.00".to_owned(),
            ],
            vec![
                "every 100 ms".to_owned(),
                format!("{with:.0}"),
                format!("{:.2}", with / without),
            ],
        ];
        table(
            "Requests per second of Redis, four clients, half of them writes",
            &["rollback", "requests/s", "share"],
            &rows,
        );
    }

    fn load(&self, every: Option<Duration>) -> f64 {
        const SECONDS: u64 = 5;
        let (stop, served) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for client in 0..4 {
                let (stop, served) = (&stop, &served);
                scope.spawn(move || {
                    // Those that came after the checkpoint are closed by a rollback, so they come anew.
                    while !stop.load(Ordering::Relaxed) {
                        let Ok(mut connection) = Connection::open(self.port) else {
                            continue;
                        };
                        for round in 0u64.. {
                            let key = (round * 7919 + client * 104_729) % 90_000;
                            let set = connection.ask(&format!("SET key:{key} {round}"));
                            let get = set.and_then(|_| connection.ask(&format!("GET key:{key}")));
                            if get.is_err() || stop.load(Ordering::Relaxed) {
                                break;
                            }
                            served.fetch_add(2, Ordering::Relaxed);
                        }
                    }
                });
            }
            let began = Instant::now();
            let mut next = began;
            while began.elapsed() < Duration::from_secs(SECONDS) {
                match every {
                    Some(every) => {
                        next += every;
                        std::thread::sleep(next.saturating_duration_since(Instant::now()));
                        self.snapback(&["rollback"]);
                    }
                    None => std::thread::sleep(Duration::from_millis(100)),
                }
            }
            let rate = served.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64();
            stop.store(true, Ordering::Relaxed);
            rate
        })
    }
}
