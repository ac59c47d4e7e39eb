//! Files of a tree with a mount namespace of its own: an overlay over this machine's `/usr`, which has all that a program
//! needs, and a tmpfs.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::*;
use crate::filesystem::Options;

/// Carries out lines of Python, and answers each with what it has called `answer`.
const PROGRAM: &str = r#"
import sys, os, mmap, traceback
names = {"os": os, "mmap": mmap}
for line in sys.stdin:
    names["answer"] = None
    try:
        exec(line.rstrip().replace("; ", "\n"), names)
        print(repr(names["answer"]), flush=True)
    except BaseException as e:
        print("FAILED", repr(e), flush=True)
"#;

struct Container {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    directory: tempfile::TempDir,
}

impl Container {
    fn start() -> Self {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        for name in ["upper", "work", "merged"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        let script = r#"
            mount -t overlay none -o lowerdir=/usr,upperdir=$0/upper,workdir=$0/work $0/merged
            cd $0/merged
            mkdir -p proc dev tmp var/tmp old
            mount --rbind /proc proc
            mount --bind /dev dev
            mount -t tmpfs none tmp
            pivot_root . old
            PYTHONHOME=/ LD_LIBRARY_PATH=/lib/x86_64-linux-gnu
            export PYTHONHOME LD_LIBRARY_PATH
            umount -l /old
            exec python3 -c "$1"
        "#;
        let mut child = Command::new("unshare")
            .args(["-m", "sh", "-e", "-c", script])
            .arg(directory.path())
            .arg(PROGRAM)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a container");
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut container = Self {
            child,
            stdin,
            stdout,
            directory,
        };
        assert_eq!(container.ask("answer = 1"), "1");
        container
    }

    fn engine(&self) -> Engine {
        let options = Options {
            store: self.directory.path().join("store"),
            ..Options::default()
        };
        let target = Target::of_pid(self.child.id() as i32);
        Engine::attach_with_files(target, options).unwrap()
    }

    fn ask(&mut self, line: &str) -> String {
        writeln!(self.stdin, "{line}").unwrap();
        let mut answer = String::new();
        self.stdout.read_line(&mut answer).unwrap();
        answer.trim_end().into()
    }

    #[track_caller]
    fn does(&mut self, line: &str) {
        assert_eq!(self.ask(line), "None", "{line}");
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const VERIFY: RollbackOptions = RollbackOptions { verify: true };

#[test]
fn files_go_back_with_memory() {
    let mut container = Container::start();
    for directory in ["/tmp", "/var/tmp"] {
        container.does(&format!("os.chdir('{directory}')"));
        container.does("f = open('a', 'w+'); n = f.write('before'); f.flush()");
        container.does("os.mkdir('d'); os.rename('a', 'd/a'); os.link('d/a', 'b')");
        container.does("open('c', 'w').close()");
    }
    container.does(
        "gone = open('gone', 'w+'); n = gone.write('deleted'); gone.flush(); os.remove('gone')",
    );
    container.does("m = open('/tmp/map', 'w+b'); m.truncate(8192); map = mmap.mmap(m.fileno(), 8192); map[0] = 7");
    container.does("m2 = open('/var/tmp/map', 'w+b'); m2.truncate(8192); map2 = mmap.mmap(m2.fileno(), 8192); map2[0] = 7");
    let mut engine = container.engine();
    let report = engine.take("one").unwrap();
    assert_eq!(report.files.included, ["/", "/tmp"]);
    for round in 0..3 {
        for directory in ["/tmp", "/var/tmp"] {
            container.does(&format!("os.chdir('{directory}')"));
            container.does("f = open('b', 'a'); n = f.write('after' * 1000); f.flush()");
            container.does("os.remove('c'); os.rename('d', 'e'); open('new', 'w').close()");
        }
        container
            .does("n = gone.write('more'); gone.flush(); map[0] = 8; map2[0] = 9; map2[4096] = 9");
        container.does("os.remove('/lib/os-release'); os.chmod('/bin/ls', 0o600)");
        let report = engine.rollback("one", VERIFY).unwrap();
        assert!(report.files.files > 8, "{round}: {report:?}");
        for directory in ["/tmp", "/var/tmp"] {
            let seen = format!(
                "os.chdir('{directory}'); answer = open('b').read(), open('d/a').read(), sorted(os.listdir('.'))"
            );
            let seen = container.ask(&seen);
            assert!(
                seen.starts_with("('before', 'before', ['b', 'c', 'd', 'map'"),
                "{seen}"
            );
        }
        let seen =
            container.ask("n = gone.seek(0); answer = gone.read(), map[0], map2[0], map2[4096]");
        assert_eq!(seen, "('deleted', 7, 7, 0)");
        let seen = container.ask("answer = open('/tmp/map', 'rb').read(1), open('/var/tmp/map', 'rb').read(1), os.path.exists('/lib/os-release'), oct(os.stat('/bin/ls').st_mode)");
        assert_eq!(seen, r"(b'\x07', b'\x07', True, '0o100755')");
    }
    engine.release(None).unwrap();
}

#[test]
fn descriptors_on_a_file_that_was_deleted_are_on_the_one_made_again() {
    let mut container = Container::start();
    container.does("import fcntl");
    for directory in ["/tmp", "/var/tmp"] {
        container.does(&format!("os.chdir('{directory}')"));
        container.does("os.mkdir('d'); f = open('d/a', 'a+'); n = f.write('before'); f.flush()");
        container.does("def lock(h): return fcntl.flock(h, fcntl.LOCK_EX | fcntl.LOCK_NB)");
        container.does(
            "g = open('d/a', 'r'); n = g.read(3); fcntl.flock(f, fcntl.LOCK_EX); os.chdir('/')",
        );
        let mut engine = container.engine();
        engine.take("one").unwrap();
        for other in [
            "",
            "open('d/a', 'w').write('other'); ",
            "f.close(); g.close(); ",
        ] {
            container.does(&format!("os.chdir('{directory}')"));
            container.does("n = f.write('after'); f.flush(); os.remove('d/a'); os.rmdir('d')");
            if !other.is_empty() {
                container.does(&format!("os.mkdir('d'); {other}n = 0"));
            }
            engine.take("two").unwrap();
            engine.rollback("one", VERIFY).unwrap();
            let same = "a, b, c = os.fstat(f.fileno()), os.fstat(g.fileno()), os.stat('d/a')";
            container.does(&format!("os.chdir('{directory}'); {same}"));
            let seen = container.ask("answer = g.read(), a.st_ino == b.st_ino == c.st_ino, c.st_nlink, os.readlink(f'/proc/self/fd/{f.fileno()}')");
            let path = format!("{directory}/d/a");
            assert_eq!(seen, format!("('ore', True, 1, '{path}')"));
            container.does("n = f.write('more'); f.flush(); h = open('d/a')");
            assert_eq!(container.ask("answer = h.read()"), "'beforemore'");
            let locked = container.ask("lock(h)");
            assert!(locked.starts_with("FAILED BlockingIOError"), "{locked}");
            engine.rollback("one", VERIFY).unwrap();
            container.does(&format!("os.chdir('{directory}')"));
            assert_eq!(container.ask("answer = open('d/a').read()"), "'before'");
            if other.is_empty() {
                engine.rollback("two", VERIFY).unwrap();
                let seen = container.ask("n = f.seek(0); answer = f.read(), os.fstat(f.fileno()).st_nlink, os.path.exists('d')");
                assert_eq!(seen, "('beforeafter', 0, False)");
                engine.rollback("one", VERIFY).unwrap();
                assert_eq!(container.ask("answer = g.read()"), "'ore'");
                engine.rollback("one", VERIFY).unwrap();
            }
            engine.release(Some("two")).unwrap();
        }
    }
}

#[test]
fn a_mapped_file_that_was_deleted_is_refused_and_nothing_is_touched() {
    let mut container = Container::start();
    container.does("f = open('/tmp/a', 'w+'); n = f.write('before'); f.flush(); map = mmap.mmap(f.fileno(), 6)");
    let mut engine = container.engine();
    engine.take("one").unwrap();
    container.does("os.remove('/tmp/a'); open('/tmp/b', 'w').close()");
    match engine.rollback("one", VERIFY) {
        Err(Error::Refused(refusal)) => {
            assert!(refusal.object.contains("mapping of /tmp/a"), "{refusal}")
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(container.ask("answer = os.listdir('/tmp')"), "['b']");
}
