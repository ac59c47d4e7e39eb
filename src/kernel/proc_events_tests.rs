use std::process::Command;

use super::*;

/// `None` where the kernel does not tell us; `snapback check` says why.
fn listener(buffer: usize) -> Option<ProcEvents> {
    match ProcEvents::open(buffer) {
        Ok(listener) => Some(listener),
        Err(error) => {
            let strict = std::env::var_os("SNAPBACK_STRICT").is_some_and(|strict| strict == "1");
            assert!(!strict, "{error}");
            println!("SKIP {error}");
            None
        }
    }
}

#[test]
fn births_and_ends_are_told_in_order() {
    let Some(mut listener) = listener(1 << 20) else {
        return;
    };
    let mut child = Command::new("true").spawn().unwrap();
    let pid = Pid::from_raw(child.id() as i32);
    child.wait().unwrap();
    let mut events = Vec::new();
    // The end is told only after the parent could collect it.
    while !events.contains(&Event::Ended(pid)) {
        listener.receive_until_now(&mut events).unwrap();
    }
    let born = Event::Born {
        parent: Pid::this(),
        child: pid,
    };
    let place = |event| events.iter().position(|other| *other == event);
    assert!(place(born) < place(Event::Ended(pid)), "{events:?}");
    assert!(place(born).is_some());
}

#[test]
fn threads_are_not_told() {
    let Some(mut listener) = listener(1 << 20) else {
        return;
    };
    let tid = std::thread::spawn(gettid).join().unwrap();
    let mut events = Vec::new();
    listener.receive_until_now(&mut events).unwrap();
    let names = |event: &Event| match event {
        Event::Born { child, .. } => *child == tid,
        Event::Ended(pid) => *pid == tid,
    };
    assert!(!events.iter().any(names), "{events:?}");
}

#[test]
fn what_does_not_fit_is_noticed() {
    let Some(mut listener) = listener(1 << 20) else {
        return;
    };
    listener.overflow();
    let lost = listener.receive_until_now(&mut Vec::new());
    assert_eq!(lost, Err(Lost::Overflow));
}

#[test]
fn a_gap_is_noticed() {
    let Some(mut listener) = listener(1 << 20) else {
        return;
    };
    listener
        .sequences
        .values_mut()
        .for_each(|sequence| *sequence = sequence.wrapping_sub(1));
    let mut gap = Ok(0);
    // The next event may come from a processor that has told none yet.
    for _ in 0..1000 {
        gap = gap.and(listener.receive_until_now(&mut Vec::new()));
    }
    assert_eq!(gap, Err(Lost::Gap));
}

#[test]
fn messages_of_any_form_are_survived() {
    let mut message = listen_request();
    assert_eq!(Message::parse(&message), None);
    message.extend([0; 40]);
    for len in 0..message.len() {
        let _ = Message::parse(&message[..len]);
    }
    message[NLMSG_HEADER] = 7;
    assert_eq!(Message::parse(&message), None);
}
