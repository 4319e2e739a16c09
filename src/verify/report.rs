//! What a verification found: a value that the command line renders.

use serde::Serialize;

use super::Depth;

/// What became of a replica, or of one finding. The later one weighs more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// All is as it should be.
    Ok,
    /// Everything that should be restorable is, but somebody should look.
    Degraded,
    /// The newest state, or another one that should be restorable, is not.
    Failed,
}

impl Verdict {
    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
        }
    }
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// How bad it is; never [`Verdict::Ok`].
    pub verdict: Verdict,
    /// The check that found it, by its name.
    pub check: String,
    /// The object that it is about.
    pub object: Option<String>,
    /// What it is.
    pub sentence: String,
}

impl Finding {
    pub(super) fn new(verdict: Verdict, check: &str, object: Option<String>, sentence: String) -> Self {
        Self { verdict, check: check.to_owned(), object, sentence }
    }

    pub(super) fn failed(check: &str, object: impl ToString, sentence: String) -> Self {
        Self::new(Verdict::Failed, check, Some(object.to_string()), sentence)
    }

    pub(super) fn degraded(check: &str, object: impl ToString, sentence: String) -> Self {
        Self::new(Verdict::Degraded, check, Some(object.to_string()), sentence)
    }
}

/// What was checked, and what it took.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// What it is called.
    pub name: String,
    /// How many were checked.
    pub checked: u64,
    /// How many there are.
    pub of: u64,
    /// What was counted: "segments".
    pub unit: &'static str,
    /// Requests to the store.
    pub requests: u64,
    /// Bytes that came from it.
    pub received_bytes: u64,
    /// How long it took.
    pub seconds: f64,
}

/// The newest state that can be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Newest {
    /// Its epoch.
    pub epoch: u32,
    /// Its transaction.
    pub txid: u64,
    /// When that was committed, in milliseconds since 1970.
    pub time_ms: u64,
}

/// What a verification of one replica found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The replica, for people.
    pub location: String,
    /// The verdict: that of the gravest finding.
    pub verdict: Verdict,
    /// The replica's id; `None` when its marker can't be read.
    pub replica: Option<String>,
    /// How deep it went.
    pub depth: Depth,
    /// What repeats its choices.
    pub seed: u64,
    /// The share of blocks and extents that was to be read, from 0 to 1; `None` where that is not asked for.
    pub sample: Option<f64>,
    /// The newest state that can be restored.
    pub newest: Option<Newest>,
    /// What was checked.
    pub checks: Vec<Check>,
    /// What is not as it should be, the gravest first.
    pub findings: Vec<Finding>,
    /// What a person should know that is no fault.
    pub notes: Vec<String>,
    /// What there was no time for.
    pub not_reached: Vec<String>,
    /// Requests to the store.
    pub requests: u64,
    /// Bytes that came from it.
    pub received_bytes: u64,
    /// How long it took.
    pub seconds: f64,
}

impl Report {
    pub(crate) fn new(location: String, depth: Depth, seed: u64) -> Self {
        Self {
            location,
            verdict: Verdict::Ok,
            replica: None,
            depth,
            seed,
            sample: None,
            newest: None,
            checks: Vec::new(),
            findings: Vec::new(),
            notes: Vec::new(),
            not_reached: Vec::new(),
            requests: 0,
            received_bytes: 0,
            seconds: 0.0,
        }
    }

    /// The gravest first, each once.
    pub(super) fn settle(&mut self) {
        self.findings.sort_by(|left, right| (right.verdict, left).cmp(&(left.verdict, right)));
        self.findings.dedup();
        self.verdict = self.findings.first().map_or(Verdict::Ok, |finding| finding.verdict);
    }

    /// The findings of a check.
    pub fn findings_of<'a>(&'a self, check: &'a str) -> impl Iterator<Item = &'a Finding> {
        self.findings.iter().filter(move |finding| finding.check == check)
    }
}
