use std::collections::BTreeSet;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::kernel::mountinfo::parse;

fn options(volumes: &[&str]) -> Options {
    Options {
        volumes: volumes.iter().map(PathBuf::from).collect(),
        ..Options::default()
    }
}

/// The verdicts about mounts of which those with `FILE` in their mount point are single files.
fn judged(theirs: &str, ours: &str, volumes: &[&str]) -> Vec<(String, Verdict)> {
    let (theirs, ours) = (
        parse(theirs.as_bytes()).unwrap(),
        parse(ours.as_bytes()).unwrap(),
    );
    let files = ["hosts", "hostname", "resolv.conf", ".containerenv"];
    let is_directory = |path: &Path| !files.iter().any(|file| path.ends_with(file));
    let judged = judge(&visible(&theirs), &ours, &options(volumes), &is_directory);
    judged
        .into_iter()
        .filter(|(_, verdict)| *verdict != Verdict::Nothing)
        .map(|(mount, verdict)| (mount.mount_point.display().to_string(), verdict))
        .collect()
}

fn left_out(why: &str) -> Verdict {
    Verdict::LeftOut(why.into())
}

const HOST: &str = "1 0 8:1 / / rw - ext4 /dev/vda rw
2 1 0:24 / /run rw - tmpfs tmpfs rw
3 1 0:25 / /dev/shm rw - tmpfs tmpfs rw
4 1 8:2 / /srv rw - xfs /dev/vdb rw
5 1 0:61 / /var/lib/containers/storage/overlay-containers/c0ffee/userdata/shm rw - tmpfs shm rw
";

#[test]
fn of_a_container_all_that_is_its_own_goes_back() {
    let theirs = "10 9 0:60 / / rw - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w
11 10 0:70 / /proc rw - proc proc rw
12 10 0:71 / /dev rw - tmpfs tmpfs rw
13 12 0:72 / /dev/pts rw - devpts devpts rw
14 12 0:61 / /dev/shm rw - tmpfs shm rw
15 12 0:73 / /dev/mqueue rw - mqueue mqueue rw
16 10 0:74 / /sys ro - sysfs sysfs ro
17 10 0:24 /containers/storage/overlay-containers/c0ffee/userdata/resolv.conf /etc/resolv.conf rw - tmpfs tmpfs rw
18 10 0:24 /containers/storage/overlay-containers/c0ffee/userdata/hosts /etc/hosts rw - tmpfs tmpfs rw
19 10 8:1 /var/lib/containers/storage/volumes/data/_data /var/lib/data rw - ext4 /dev/vda rw
20 10 8:2 /shared /mnt rw - xfs /dev/vdb rw
21 10 8:2 /other /other ro - xfs /dev/vdb rw
22 10 0:25 / /host-shm rw - tmpfs tmpfs rw
23 10 0:24 /secrets /run/secrets rw - tmpfs tmpfs rw
24 10 0:75 / /tmp rw - tmpfs tmpfs rw
25 10 0:75 /private /var/tmp rw - tmpfs tmpfs rw
26 11 0:76 / /proc/acpi ro - tmpfs tmpfs ro
27 10 0:77 / /nfs rw - nfs4 server:/x rw
";
    let asked = |volumes: &[&str]| judged(theirs, HOST, volumes);
    let file = left_out("a single file of the host's");
    let from_host = |path: &str| {
        left_out(&format!(
            "mounted from the host; --volume {path} takes it in"
        ))
    };
    let expected = [
        ("/", Verdict::Overlay),
        ("/dev", Verdict::Tmpfs),
        ("/dev/shm", Verdict::Tmpfs),
        ("/etc/resolv.conf", file.clone()),
        ("/etc/hosts", file),
        ("/var/lib/data", Verdict::Volume),
        ("/mnt", from_host("/mnt")),
        ("/other", left_out("read-only")),
        ("/host-shm", from_host("/host-shm")),
        ("/run/secrets", from_host("/run/secrets")),
        ("/tmp", Verdict::Tmpfs),
        ("/nfs", left_out("nfs4: others can change these files")),
    ]
    .map(|(place, verdict)| (place.to_owned(), verdict));
    assert_eq!(asked(&[]), expected);
    let with_more = asked(&["/mnt", "/host-shm", "/other", "/nfs"]);
    let changed: Vec<_> = with_more
        .iter()
        .filter(|verdict| !expected.contains(verdict))
        .collect();
    assert_eq!(
        changed,
        [
            &("/mnt".to_owned(), Verdict::Volume),
            &("/host-shm".to_owned(), Verdict::Volume)
        ]
    );
}

/// Recorded of podman 4.3.1, Docker 20.10 and containerd 1.6 with runc; storage directories renamed to the default ones.
#[test]
fn containers_of_the_engines_are_understood() {
    let read = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/mountinfo");
        fs::read_to_string(path.join(name)).unwrap()
    };
    let areas = |name: &str, ours: &str| -> Vec<String> {
        let judged = judged(&read(name), ours, &[]);
        judged
            .iter()
            .map(|(place, verdict)| match verdict {
                Verdict::LeftOut(why) => format!("{place}: {}", &why[..8]),
                other => format!("{place} {other:?}"),
            })
            .collect()
    };
    let podman = [
        "/ Overlay",
        "/anon Volume",
        "/bindmnt: mounted ",
        "/scratch Tmpfs",
        "/dev Tmpfs",
        "/s2 Tmpfs",
        "/data Volume",
        "/etc/hosts: a single",
        "/dev/shm Tmpfs",
        "/etc/resolv.conf: a single",
        "/run/.containerenv: a single",
        "/etc/hostname: a single",
    ];
    let found = areas("podman", &read("podman.host"));
    assert_eq!(
        BTreeSet::from_iter(found.iter().map(String::as_str)),
        BTreeSet::from(podman)
    );
    let docker = areas("docker", HOST);
    for expected in [
        "/ Overlay",
        "/data Volume",
        "/anon Volume",
        "/scratch Tmpfs",
        "/dev/shm Tmpfs",
        "/bindmnt: mounted ",
    ] {
        assert!(docker.contains(&expected.to_owned()), "{docker:#?}");
    }
    assert_eq!(
        areas("containerd", HOST),
        ["/ Overlay", "/dev Tmpfs", "/dev/shm Tmpfs", "/run Tmpfs"]
    );
}

#[test]
fn files_that_are_mounted_twice_are_one_area() {
    let theirs = "10 9 0:60 / / rw - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w
11 10 0:60 /data /again rw - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w
12 10 8:2 /a/b /deep rw - xfs /dev/vdb rw
13 10 8:2 /a /wide rw - xfs /dev/vdb rw
14 10 8:2 /a /wide-too rw - xfs /dev/vdb rw
";
    assert_eq!(
        judged(theirs, HOST, &["/deep", "/wide", "/wide-too"]),
        [
            ("/".to_owned(), Verdict::Overlay),
            ("/wide".to_owned(), Verdict::Volume)
        ]
    );
}

#[test]
fn a_plain_root_is_an_area_only_if_asked_for() {
    let theirs = "10 9 8:1 /bundle/rootfs / rw - ext4 /dev/vda rw
11 10 0:71 / /dev rw - tmpfs tmpfs rw
";
    let root = |volumes: &[&str]| judged(theirs, HOST, volumes)[0].1.clone();
    assert_eq!(root(&[]), Verdict::PlainRoot);
    assert_eq!(root(&["/"]), Verdict::Volume);
    let read_only = theirs.replace("/ rw - ext4", "/ ro - ext4");
    assert_eq!(judged(&read_only, HOST, &[])[0].1, left_out("read-only"));
}

/// A process in a root directory and mount namespace of its own, set up by a shell script, and its directory.
struct Sleeper {
    child: Child,
    place: tempfile::TempDir,
}

impl Sleeper {
    fn start(mounts: &str) -> Self {
        let place = tempfile::tempdir().unwrap();
        for name in [
            "low,er/bin",
            "low,er/tmp",
            "low,er/data",
            "upper",
            "wo:rk",
            "m",
            "volume",
        ] {
            fs::create_dir_all(place.path().join(name)).unwrap();
        }
        fs::copy("/bin/busybox", place.path().join("low,er/bin/sh")).unwrap();
        let script = format!("set -e; {mounts}; exec chroot m /bin/sh -c 'echo up; read x'");
        let mut child = Command::new("unshare")
            .args(["--mount", "sh", "-c", &script])
            .current_dir(place.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut word = [0; 3];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut word).unwrap();
        Self { child, place }
    }

    fn discover(&self, volumes: &[&str]) -> Result<Found> {
        discover(
            Pid::from_raw(self.child.id().cast_signed()),
            &options(volumes),
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().canonicalize().unwrap().join(name)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const OVERLAY: &str = "mount -t overlay o -o \"lowerdir=$PWD/low\\\\,er,upperdir=$PWD/upper,workdir=$PWD/wo\\\\:rk\" m";

fn refusal(found: Result<Found>) -> Refusal {
    match found {
        Err(Error::Refused(refusal)) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn the_layers_are_found_where_they_are() {
    let mounts = format!("{OVERLAY}; mount -t tmpfs t m/tmp; mount --bind volume m/data");
    let sleeper = Sleeper::start(&mounts);
    let found = sleeper.discover(&["/data"]).unwrap();
    let kinds: Vec<_> = found
        .areas
        .iter()
        .map(|area| (area.mount_point.to_str().unwrap(), &area.kind))
        .collect();
    let overlay = Kind::Overlay {
        upper: sleeper.path("upper"),
        lowers: vec![sleeper.path("low,er")],
    };
    let volume = Kind::Volume {
        source: sleeper.path("volume"),
    };
    assert_eq!(
        kinds,
        [("/", &overlay), ("/tmp", &Kind::Tmpfs), ("/data", &volume)]
    );
    assert_eq!(found.left_out, []);
    let without = sleeper.discover(&[]).unwrap();
    assert_eq!(without.areas.len(), 2);
    assert_eq!(without.left_out[0].mount_point, Path::new("/data"));
    assert!(
        refusal(sleeper.discover(&["/nowhere"]))
            .object
            .contains("/nowhere")
    );
}

#[test]
fn a_layer_that_is_another_directory_is_not_taken_for_it() {
    for (name, what) in [("upper", "upper"), ("low,er", "lower")] {
        let sleeper = Sleeper::start(OVERLAY);
        // Behind its back, as in a mount namespace that has something else there.
        fs::rename(sleeper.path(name), sleeper.path("away")).unwrap();
        fs::create_dir_all(sleeper.path(name).join("bin")).unwrap();
        let refusal = refusal(sleeper.discover(&[]));
        assert!(refusal.object.contains(what), "{refusal}");
        assert!(refusal.remedy.contains("--no-files"), "{refusal}");
    }
}

#[test]
fn a_plain_root_directory_is_refused_with_the_remedy() {
    let sleeper = Sleeper::start("mount --bind low,er m");
    let refusal = refusal(sleeper.discover(&[]));
    assert!(refusal.remedy.contains("--overlay") && refusal.remedy.contains("--no-files"));
    let found = sleeper.discover(&["/"]).unwrap();
    let source = sleeper.path("low,er");
    assert_eq!(found.areas[0].kind, Kind::Volume { source });
}

#[test]
fn the_host_s_files_stay() {
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = Pid::from_raw(child.id().cast_signed());
    let found = discover(pid, &options(&[]));
    let refused = discover(pid, &options(&["/tmp"]));
    child.kill().unwrap();
    child.wait().unwrap();
    let found = found.unwrap();
    assert_eq!((found.areas.len(), found.left_out.len()), (0, 1));
    assert!(refusal(refused).object.contains("/tmp"));
}
