//! The whole path on small real programs.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::*;

const PROGRAM: &str = r#"
import sys, mmap
state = {"count": 0}
big = bytearray(32 << 20)
kept = []
for line in sys.stdin:
    word = line.split()
    if word[0] == "add":
        state["count"] += int(word[1])
        for i in range(0, len(big), 40960): big[i] = state["count"] % 251
        kept.append(mmap.mmap(-1, 1 << 20))
        kept[-1][0:5] = b"hello"
    if word[0] == "drop" and kept:
        kept.pop(len(kept) // 2).close()
    if word[0] == "forget" and kept:
        kept.pop().close()
        kept = kept[1:]
    if word[0] == "bind":
        import ctypes
        kept.append(mmap.mmap(-1, 1 << 20))
        at = ctypes.addressof(ctypes.c_char.from_buffer(kept[-1]))
        mbind, interleave, nodes = 237, 3, ctypes.c_ulong(1)
        arguments = [ctypes.c_ulong(number) for number in (at, 1 << 20, interleave)]
        bound = ctypes.CDLL(None).syscall(mbind, *arguments, ctypes.byref(nodes), ctypes.c_ulong(64), 0)
        assert bound == 0
    print(state["count"], len(kept), sum(big[::4096]), flush=True)
"#;

pub(super) struct Program {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Program {
    pub(super) fn start() -> Self {
        let mut child = Command::new("python3")
            .args(["-c", PROGRAM])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("start python3");
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            stdin,
            stdout,
        }
    }

    pub(super) fn id(&self) -> i32 {
        self.child.id() as i32
    }

    pub(super) fn ask(&mut self, line: &str) -> String {
        writeln!(self.stdin, "{line}").unwrap();
        let mut answer = String::new();
        self.stdout.read_line(&mut answer).unwrap();
        answer.trim_end().into()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_program_goes_back_as_often_as_asked() {
    let mut program = Program::start();
    program.ask("add 3");
    let before = program.ask("show");
    let mut engine = Engine::attach(Target::of_pid(program.child.id() as i32)).unwrap();
    engine.checkpoint("a").unwrap();
    assert_eq!(program.ask("show"), before);
    for round in 0..10 {
        let wrecked = program.ask(&format!("add {}", round + 1));
        assert_ne!(wrecked, before);
        let report = engine
            .rollback(
                "a",
                RollbackOptions {
                    verify: round % 2 == 0,
                },
            )
            .unwrap();
        assert_eq!(report.outcome, Outcome::RolledBack);
        assert_eq!(program.ask("show"), before, "round {round}");
    }
    engine.release(None).unwrap();
    assert_eq!(program.ask("show"), before);
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", program.child.id())).unwrap();
    assert!(!maps.contains("snapback"));
}

#[test]
fn any_of_several_checkpoints_is_a_target() {
    let mut program = Program::start();
    let mut engine = Engine::attach(Target::of_pid(program.child.id() as i32)).unwrap();
    let mut states = Vec::new();
    for step in 1..=4 {
        states.push((format!("s{step}"), program.ask(&format!("add {step}"))));
        engine.checkpoint(&states.last().unwrap().0).unwrap();
    }
    for turn in [3, 0, 2, 2, 1, 3, 0, 1] {
        let (name, state) = &states[turn];
        program.ask("add 100");
        engine
            .rollback(name, RollbackOptions { verify: true })
            .unwrap();
        assert_eq!(&program.ask("show"), state, "{name}");
    }
    engine.release(Some("s2")).unwrap();
    engine
        .rollback("s1", RollbackOptions { verify: true })
        .unwrap();
    assert_eq!(program.ask("show"), states[0].1);
    assert!(matches!(
        engine.rollback("s2", RollbackOptions::default()),
        Err(Error::Failed(_))
    ));
}

#[test]
fn lost_process_events_are_refused_until_the_next_checkpoint() {
    let mut program = Program::start();
    let before = program.ask("add 3");
    let mut engine = Engine::attach(Target::of_pid(program.child.id() as i32)).unwrap();
    engine.checkpoint("before").unwrap();
    if !engine.tree.lose_events() {
        println!("SKIP no process events");
        return;
    }
    let wrecked = program.ask("add 4");
    for _ in 0..2 {
        match engine.rollback("before", RollbackOptions::default()) {
            Err(Error::Refused(refusal)) => {
                assert!(refusal.remedy.contains("may have been missed"), "{refusal}")
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(program.ask("show"), wrecked);
    }
    engine.checkpoint("after").unwrap();
    program.ask("add 5");
    engine
        .rollback("after", RollbackOptions { verify: true })
        .unwrap();
    assert_eq!(program.ask("show"), wrecked);
    assert_ne!(before, wrecked);
    assert!(matches!(
        engine.rollback("before", RollbackOptions::default()),
        Err(Error::Refused(_))
    ));
}
