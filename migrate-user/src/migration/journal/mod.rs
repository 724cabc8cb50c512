//! Who has the VM, written down before it is acted on.
//!
//! One file on each host, append-only, each line `CRC32C JSON`. Every record that matters is on disk before its
//! consequence happens, so an agent that was killed finds out after its restart, together with its peer, who has
//! the VM. What is written:
//!
//! * the source, before it touches the VM: *offered*; before it sends the commit: *committed*; a decision of a human or
//!   for a destination that claims: *decided*; at the end: *concluded*;
//! * the destination, before its VMM waits: *waiting*; before the vCPUs start: *decided* accepted; when the VM never
//!   ran and never will: *decided* refused; at the end: *concluded*.
//!
//! What follows from the records is in [`SessionState`]; this file keeps them.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
};

use serde::{Deserialize, Serialize};

use super::handover::{Answer, Change, Recorded, SessionState, Verdict};
use crate::sync::lock;

/// Sessions that are remembered after their end, for a peer that asks late.
const REMEMBERED: usize = 1000;
/// Largest journal that is read, bytes.
const MAX_FILE: u64 = 64 << 20;

/// Which part this host has in a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The VM was to leave.
    Source,
    /// The VM was to come.
    Destination,
}

/// What does not change about a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Session {
    /// Number of the migration, the same on both hosts.
    pub session: u64,
    /// Its name for operators, the same on both hosts.
    #[serde(default)]
    pub id: String,
    /// The VM.
    pub vm: String,
    /// Control address of the other host, as far as it is known.
    #[serde(default)]
    pub peer: Option<SocketAddr>,
    /// The other host by its certificate, where it has shown one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_name: Option<String>,
    /// Whether the source's stopped VM is to be kept after a success.
    #[serde(default)]
    pub keep_source: bool,
    /// Files of the VM's RAM on this host, as far as they are known.
    #[serde(default)]
    pub ram: Vec<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
enum Record {
    Offered(Session),
    Waiting(Session),
    Committed {
        session: u64,
    },
    Decided {
        session: u64,
        verdict: Verdict,
    },
    Concluded {
        session: u64,
        /// Older versions did not write it.
        #[serde(default)]
        verdict: Option<Verdict>,
    },
}

impl Record {
    const fn change(&self) -> Change {
        match self {
            Self::Offered(_) => Change::Offered,
            Self::Waiting(_) => Change::Waiting,
            Self::Committed { .. } => Change::Committed,
            Self::Decided { verdict, .. } => Change::Decided(*verdict),
            Self::Concluded { verdict, .. } => Change::Concluded(*verdict),
        }
    }

    const fn number(&self) -> u64 {
        match self {
            Self::Offered(session) | Self::Waiting(session) => session.session,
            Self::Committed { session } | Self::Decided { session, .. } | Self::Concluded { session, .. } => {
                *session
            }
        }
    }
}

/// A session that has no end yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenSession {
    /// What it is.
    pub session: Session,
    /// This host's part.
    pub role: Role,
    /// How far it got.
    pub state: SessionState,
}

#[derive(Clone, Debug, Default)]
struct Entry {
    begun: Option<(Role, Session)>,
    state: SessionState,
    /// Order of the last beginning or, without one, of the first mention.
    number: u64,
}

struct Inner {
    file: File,
    /// Where a record begins that was written in part and could not be taken back, bytes.
    torn: Option<u64>,
    sessions: BTreeMap<u64, Entry>,
    next: u64,
}

/// The journal of one host.
pub struct Journal {
    path: PathBuf,
    inner: Mutex<Inner>,
}

impl Journal {
    /// Opens or creates it. A torn last line, as a crash leaves it, is cut off; a bad line before the last is an
    /// error, because what it said is not known.
    ///
    /// # Errors
    /// What the file system says, or `InvalidData` with the line's number.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut sessions = BTreeMap::new();
        let mut next = 0;
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.len() > MAX_FILE => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{} bytes are too many", metadata.len()),
                ));
            }
            Ok(_) => {
                for record in parse(&std::fs::read(path)?)? {
                    apply(&mut sessions, &mut next, record);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let file = rewrite(path, &mut sessions)?;
        let inner = Inner { file, torn: None, sessions, next };
        Ok(Self { path: path.to_owned(), inner: Mutex::new(inner) })
    }

    /// Its file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// The source is about to touch the VM.
    ///
    /// # Errors
    /// When it cannot be written down: then the VM must not be touched.
    pub fn offer(&self, session: Session) -> io::Result<()> {
        let mut inner = self.lock();
        inner.expect_free(Role::Source, &session)?;
        inner.append(Record::Offered(session))
    }

    /// The source is about to send the commit.
    ///
    /// # Errors
    /// When it cannot be written down: then it must not be sent.
    pub fn commit(&self, session: u64) -> io::Result<()> {
        self.lock().append(Record::Committed { session })
    }

    /// The destination is about to have a VMM wait. May be repeated when more is known of the session.
    ///
    /// # Errors
    /// When it cannot be written down: then no VMM must be started.
    pub fn wait(&self, session: Session) -> io::Result<()> {
        let mut inner = self.lock();
        inner.expect_free(Role::Destination, &session)?;
        inner.append(Record::Waiting(session))
    }

    /// Decides about a session, unless that was done before: the first decision stands.
    ///
    /// # Errors
    /// When it cannot be written down: then nothing is decided.
    pub fn decide(&self, session: u64, verdict: Verdict) -> io::Result<Recorded> {
        let mut inner = self.lock();
        if let Some(before) = inner.state(session).decide(verdict) {
            return Ok(before);
        }
        inner.append(Record::Decided { session, verdict })?;
        Ok(Recorded::Written)
    }

    /// The destination's answer to a source that asks who has the VM; see [`SessionState::asked_by_source`].
    ///
    /// # Errors
    /// When it cannot be written down: then there is no answer.
    pub fn asked_by_source(&self, session: u64) -> io::Result<Option<Verdict>> {
        let mut inner = self.lock();
        let answer = inner.state(session).asked_by_source();
        answer.map_or(Ok(None), |answer| inner.answer(session, answer))
    }

    /// The source's answer to a destination that died after it took the VM; see
    /// [`SessionState::claimed_by_destination`].
    ///
    /// # Errors
    /// When it cannot be written down: then there is no answer.
    pub fn claimed_by_destination(&self, session: u64, whole: bool) -> io::Result<Option<Verdict>> {
        let mut inner = self.lock();
        let answer = inner.state(session).claimed_by_destination(whole);
        answer.map_or(Ok(None), |answer| inner.answer(session, answer))
    }

    /// Takes an acceptance back: the VM was ended before it ever ran.
    ///
    /// # Errors
    /// When it cannot be written down: then it stands.
    pub fn revoke(&self, session: u64) -> io::Result<()> {
        let mut inner = self.lock();
        if inner.state(session).verdict == Some(Verdict::Refused) {
            return Ok(());
        }
        inner.append(Record::Decided { session, verdict: Verdict::Refused })
    }

    /// Nothing is left to do for a session.
    ///
    /// # Errors
    /// When it cannot be written down; it will then be looked at again after a restart, which is harmless.
    pub fn conclude(&self, session: u64, verdict: Verdict) -> io::Result<()> {
        let mut inner = self.lock();
        let written = inner.append(Record::Concluded { session, verdict: Some(verdict) });
        // True in any case; on disk it only saves work after a restart.
        if let Some(entry) = inner.sessions.get_mut(&session) {
            entry.state.apply(Change::Concluded(Some(verdict)));
        }
        written
    }

    /// How far a session got.
    pub fn state(&self, session: u64) -> SessionState {
        self.lock().state(session)
    }

    /// What a session is, and this host's part in it; `None` when it is not remembered.
    pub fn begun(&self, session: u64) -> Option<(Role, Session)> {
        self.lock().sessions.get(&session)?.begun.clone()
    }

    /// Sessions without an end.
    pub fn open_sessions(&self) -> Vec<OpenSession> {
        let inner = self.lock();
        let open = inner.sessions.values().filter(|entry| entry.state.is_open());
        open.filter_map(|entry| {
            let (role, session) = entry.begun.clone()?;
            Some(OpenSession { session, role, state: entry.state })
        })
        .collect()
    }

    /// Names of all migrations that are remembered.
    pub fn ids(&self) -> Vec<String> {
        let inner = self.lock();
        inner.sessions.values().filter_map(|entry| Some(entry.begun.as_ref()?.1.id.clone())).collect()
    }
}

impl Inner {
    /// That a number is not another migration's. Who listens to the migration network knows the numbers of others, and
    /// with one of them could otherwise take the place of what stands here under it.
    fn expect_free(&self, role: Role, session: &Session) -> io::Result<()> {
        let begun = self.sessions.get(&session.session).and_then(|entry| entry.begun.as_ref());
        let same = |(other_role, other): &(Role, Session)| {
            *other_role == role
                && (&other.id, &other.vm, &other.peer_name) == (&session.id, &session.vm, &session.peer_name)
        };
        match begun {
            Some(other) if !same(other) => Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!(
                    "session {} is migration {} already: try again, with another",
                    session.session, other.1.id
                ),
            )),
            _ => Ok(()),
        }
    }

    fn state(&self, session: u64) -> SessionState {
        self.sessions.get(&session).map(|entry| entry.state).unwrap_or_default()
    }

    fn answer(&mut self, session: u64, answer: Answer) -> io::Result<Option<Verdict>> {
        match answer {
            Answer::Stands(verdict) => Ok(Some(verdict)),
            Answer::Decide(verdict) => {
                self.append(Record::Decided { session, verdict })?;
                Ok(Some(verdict))
            }
        }
    }

    /// Writes a record and waits until it is on disk.
    fn append(&mut self, record: Record) -> io::Result<()> {
        // What an earlier attempt left of a line must not stay in front of this one.
        if let Some(length) = self.torn {
            self.file.set_len(length)?;
            self.torn = None;
        }
        let length = self.file.metadata()?.len();
        let written = self.file.write_all(&line(&record)).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            self.torn = self.file.set_len(length).is_err().then_some(length);
            return Err(error);
        }
        apply(&mut self.sessions, &mut self.next, record);
        Ok(())
    }
}

fn line(record: &Record) -> Vec<u8> {
    // Plain enums of strings and numbers always have a JSON form.
    let json = serde_json::to_string(record).unwrap_or_default();
    format!("{:08x} {json}\n", crate::checksum::crc32c(json.as_bytes())).into_bytes()
}

/// Reads a journal's bytes.
fn parse(bytes: &[u8]) -> io::Result<Vec<Record>> {
    let mut records = Vec::new();
    let mut lines = bytes.split_inclusive(|&byte| byte == b'\n').enumerate().peekable();
    while let Some((number, line)) = lines.next() {
        match parse_line(line) {
            Some(record) => records.push(record),
            None if lines.peek().is_none() => break,
            None => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("line {} is damaged, and what it said about a VM is not known", number + 1),
                ));
            }
        }
    }
    Ok(records)
}

fn parse_line(line: &[u8]) -> Option<Record> {
    let line = line.strip_suffix(b"\n")?;
    let (sum, json) = line.split_at_checked(8)?;
    let sum = u32::from_str_radix(std::str::from_utf8(sum).ok()?, 16).ok()?;
    let json = json.strip_prefix(b" ")?;
    (crate::checksum::crc32c(json) == sum).then(|| serde_json::from_slice(json).ok()).flatten()
}

fn apply(sessions: &mut BTreeMap<u64, Entry>, next: &mut u64, record: Record) {
    let entry = sessions.entry(record.number()).or_default();
    if entry.number == 0 {
        *next += 1;
        entry.number = *next;
    }
    entry.state.apply(record.change());
    let (role, session) = match record {
        Record::Offered(session) => {
            // Before there were names, there was no record of the commit either: it may have been sent.
            entry.state.committed |= session.id.is_empty();
            (Role::Source, session)
        }
        Record::Waiting(session) => (Role::Destination, session),
        _ => return,
    };
    let (number, vm) = (session.session, session.vm.clone());
    entry.begun = Some((role, session));
    *next += 1;
    entry.number = *next;
    // A VM takes part in one session at a time: what is open of an earlier one only could not be written.
    for (other, entry) in sessions.iter_mut() {
        if *other != number && entry.begun.as_ref().is_some_and(|(_, earlier)| earlier.vm == vm) {
            entry.state.apply(Change::Concluded(None));
        }
    }
}

/// Forgets what is not needed any more, and writes the rest anew.
fn compact(sessions: &mut BTreeMap<u64, Entry>) -> Vec<u8> {
    let mut ended: Vec<(u64, u64)> = sessions
        .iter()
        .filter(|(_, entry)| !entry.state.is_open())
        .map(|(&session, entry)| (entry.number, session))
        .collect();
    ended.sort_unstable();
    for (_, session) in ended.iter().take(ended.len().saturating_sub(REMEMBERED)) {
        sessions.remove(session);
    }
    let mut text = Vec::new();
    // In the order in which they began: a later session of a VM ends the earlier ones, when this is read again too.
    let mut ordered: Vec<(&u64, &Entry)> = sessions.iter().collect();
    ordered.sort_unstable_by_key(|(_, entry)| entry.number);
    for (&session, entry) in ordered {
        match entry.begun.clone() {
            Some((Role::Source, begun)) => text.extend(line(&Record::Offered(begun))),
            Some((Role::Destination, begun)) => text.extend(line(&Record::Waiting(begun))),
            None => {}
        }
        if entry.state.committed {
            text.extend(line(&Record::Committed { session }));
        }
        if let Some(verdict) = entry.state.verdict {
            text.extend(line(&Record::Decided { session, verdict }));
        }
        if entry.state.concluded {
            text.extend(line(&Record::Concluded { session, verdict: entry.state.verdict }));
        }
    }
    text
}

/// Writes what is still needed to a new file and puts it in the old one's place.
fn rewrite(path: &Path, sessions: &mut BTreeMap<u64, Entry>) -> io::Result<File> {
    let text = compact(sessions);
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(&text)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    if let Some(directory) = path.parent() {
        File::open(directory)?.sync_all()?;
    }
    OpenOptions::new().append(true).open(path)
}

/// One input of the fuzz target `journal`: a file as it lies on disk or, after a first byte that is even, lines whose
/// checksums are put in front here. What can be read is the same after it was written anew.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    let Some((mode, text)) = data.split_first() else { return };
    let bytes = if mode % 2 == 1 {
        text.to_vec()
    } else {
        let mut bytes = Vec::new();
        for json in text.split(|&byte| byte == b'\n').filter(|json| !json.is_empty()) {
            bytes.extend(format!("{:08x} ", crate::checksum::crc32c(json)).into_bytes());
            bytes.extend(json);
            bytes.push(b'\n');
        }
        bytes
    };
    let read = |bytes: &[u8]| -> io::Result<BTreeMap<u64, Entry>> {
        let (mut sessions, mut next) = (BTreeMap::new(), 0);
        for record in parse(bytes)? {
            apply(&mut sessions, &mut next, record);
        }
        Ok(sessions)
    };
    let Ok(mut sessions) = read(&bytes) else { return };
    let again = read(&compact(&mut sessions));
    let open = |sessions: &BTreeMap<u64, Entry>| -> Vec<_> {
        let open = sessions.values().filter(|entry| entry.begun.is_some() && entry.state.is_open());
        open.map(|entry| (entry.begun.clone(), entry.state)).collect()
    };
    assert_eq!(again.map(|again| open(&again)).ok(), Some(open(&sessions)));
}

#[cfg(test)]
mod tests;
