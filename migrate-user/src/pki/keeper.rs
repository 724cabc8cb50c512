//! A host's files as they are now: read anew when they change.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use super::{CA_FILE, CERTIFICATE_FILE, Identity, KEY_FILE, PkiError, REVOKED_FILE};
use crate::sync::lock;

/// How often somebody should [`Keeper::look`], so that a warning comes soon.
pub const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Keeps the last files that were good.
#[derive(Debug)]
pub struct Keeper {
    dir: PathBuf,
    name: String,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    identity: Identity,
    /// The files as they were just before they were read.
    seen: Files,
    /// Why the files that are there now are not what is held.
    problem: Option<String>,
}

/// What tells a file from its successor: device, inode, length, and times of last change (of content, of the inode), ns.
type File = Option<(u64, u64, u64, i128, i128)>;
type Files = [File; 4];

impl Keeper {
    /// Reads the files in `dir` of the host `name`.
    ///
    /// # Errors
    /// As [`Identity::load`].
    pub fn open(dir: &Path, name: &str) -> Result<Self, PkiError> {
        let seen = files(dir);
        let identity = Identity::load(dir, name)?;
        let held = Mutex::new(Held { identity, seen, problem: None });
        Ok(Self { dir: dir.to_owned(), name: name.to_owned(), held })
    }

    /// What holds for a connection that begins now: the files are looked at, and read if they changed.
    pub fn current(&self) -> Identity {
        let mut held = self.held();
        if held.seen != files(&self.dir) {
            self.read(&mut held);
        }
        held.identity.clone()
    }

    /// The same; files that were no good are tried once more too. Says whether they are others now.
    pub fn look(&self) -> bool {
        let mut held = self.held();
        let changed = held.seen != files(&self.dir);
        (changed || held.problem.is_some()) && self.read(&mut held)
    }

    /// Reads them, changed or not.
    pub fn reload(&self) -> bool {
        self.read(&mut self.held())
    }

    /// Why the files that are there now are not used, if they are not.
    pub fn problem(&self) -> Option<String> {
        self.held().problem.clone()
    }

    /// What is held, without a look at the files.
    pub fn held_identity(&self) -> Identity {
        self.held().identity.clone()
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        lock(&self.held)
    }

    /// Whether the files were good.
    fn read(&self, held: &mut Held) -> bool {
        held.seen = files(&self.dir);
        match Identity::renew(&self.dir, &self.name) {
            Ok(identity) => {
                held.identity = identity;
                held.problem = None;
                let own = held.identity.own();
                tracing::info!(
                    expires = %own.expires.date(),
                    revoked = held.identity.revoked(),
                    "certificates read anew; they hold for connections from now on"
                );
                held.identity.warn_if_revoked();
                true
            }
            Err(error) => {
                let problem = error.to_string();
                if held.problem.as_ref() != Some(&problem) {
                    tracing::warn!(
                        "new certificates are not taken, and the ones before stay in use: {problem}"
                    );
                }
                held.problem = Some(problem);
                false
            }
        }
    }
}

fn files(dir: &Path) -> Files {
    [CA_FILE, CERTIFICATE_FILE, KEY_FILE, REVOKED_FILE].map(|file| {
        let found = std::fs::metadata(dir.join(file)).ok()?;
        let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
        Some((
            found.dev(),
            found.ino(),
            found.len(),
            ns(found.mtime(), found.mtime_nsec()),
            ns(found.ctime(), found.ctime_nsec()),
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::{super::*, *};
    use time::{Duration as Span, OffsetDateTime};

    fn days(dir: &Path, days: u32) {
        issue(dir, "host-a", &dir.join("a"), Validity::from_now(days), true).unwrap();
    }

    #[test]
    fn new_files_are_taken_and_bad_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let (ca, a) = (dir.path(), dir.path().join("a"));
        init(ca, "CA", Validity::from_now(50), false).unwrap();
        days(ca, 5);
        let keeper = Keeper::open(&a, "host-a").unwrap();
        assert!(!keeper.look(), "nothing is new");
        days(ca, 9);
        assert_eq!(keeper.held_identity().own().days_left(), 4);
        assert_eq!(keeper.current().own().days_left(), 8, "at once");
        assert!(!keeper.look() && keeper.problem().is_none());
        let kept = |words: &[&str]| {
            assert_eq!(keeper.current().own().days_left(), 8, "{words:?}");
            let problem = keeper.problem().unwrap();
            assert!(words.iter().all(|word| problem.contains(word)), "{words:?} in {problem}");
            assert!(!keeper.look() && !keeper.reload(), "they are no better");
        };
        // A copy that is half done.
        let key = std::fs::read(a.join(KEY_FILE)).unwrap();
        let certificate = std::fs::read(a.join(CERTIFICATE_FILE)).unwrap();
        issue(ca, "host-a", &ca.join("next"), Validity::from_now(20), false).unwrap();
        std::fs::copy(ca.join("next").join(CERTIFICATE_FILE), a.join(CERTIFICATE_FILE)).unwrap();
        kept(&["agent.key", "not the key of agent.pem"]);
        std::fs::copy(ca.join("next").join(KEY_FILE), a.join(KEY_FILE)).unwrap();
        assert!(keeper.look() && keeper.problem().is_none());
        assert_eq!(keeper.current().own().days_left(), 19);
        std::fs::write(a.join(KEY_FILE), &key).unwrap();
        std::fs::write(a.join(CERTIFICATE_FILE), &certificate).unwrap();
        assert_eq!(keeper.current().own().days_left(), 8);
        // Of another host; gone; expired.
        issue(ca, "host-b", &a, Validity::from_now(20), true).unwrap();
        kept(&["agent.pem", "\"host-b\""]);
        std::fs::remove_file(a.join(CA_FILE)).unwrap();
        kept(&["no", "ca.pem"]);
        std::fs::copy(ca.join(CA_FILE), a.join(CA_FILE)).unwrap();
        let now = OffsetDateTime::now_utc();
        let over = Validity { from: now - Span::days(9), until: now - Span::days(1) };
        issue(ca, "host-a", &a, over, true).unwrap();
        kept(&["agent.pem", "expired"]);
        let soon = Validity { from: now + Span::days(1), until: now + Span::days(9) };
        issue(ca, "host-a", &a, soon, true).unwrap();
        kept(&["agent.pem", "not valid yet"]);
        // At a start one that has expired is better than none.
        issue(ca, "host-a", &a, over, true).unwrap();
        assert!(Keeper::open(&a, "host-a").unwrap().held_identity().own().days_left() < 0);
    }

    #[test]
    fn lists_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let (ca, a) = (dir.path(), dir.path().join("a"));
        init(ca, "CA", Validity::from_now(50), false).unwrap();
        days(ca, 5);
        issue(ca, "host-b", &ca.join("b"), Validity::from_now(5), false).unwrap();
        let keeper = Keeper::open(&a, "host-a").unwrap();
        assert_eq!(keeper.current().revoked(), 0);
        let list = revoke(ca, "host-b").unwrap().path;
        std::fs::copy(&list, a.join(REVOKED_FILE)).unwrap();
        assert_eq!((keeper.current().revoked(), keeper.current().is_revoked()), (1, false));
        // One that is cut off takes nobody off the list.
        std::fs::write(a.join(REVOKED_FILE), &std::fs::read(&list).unwrap()[..100]).unwrap();
        assert_eq!(keeper.current().revoked(), 1);
        assert!(keeper.problem().unwrap().contains("crl.pem"));
        assert!(
            Keeper::open(&a, "host-a").is_err(),
            "who is revoked must not come in because a file is broken"
        );
        // It concerns this host itself: the list holds all the same.
        revoke(ca, "host-a").unwrap();
        std::fs::copy(&list, a.join(REVOKED_FILE)).unwrap();
        assert_eq!((keeper.current().revoked(), keeper.current().is_revoked()), (2, true));
        std::fs::remove_file(a.join(REVOKED_FILE)).unwrap();
        assert_eq!((keeper.current().revoked(), keeper.problem()), (0, None));
    }
}
