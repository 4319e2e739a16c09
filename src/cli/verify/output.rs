//! A report as text, JSON, JUnit XML and Markdown.

use std::fmt::Write;

use serde_json::json;

use super::super::exit_code::{Failure, code_of};
use crate::clock::format_time;
use crate::verify::report::{Check, Finding, Report, Verdict};

/// What became of one replica.
pub(super) struct Outcome {
    pub(super) location: String,
    /// The report, or why there is none.
    pub(super) result: Result<Report, Failure>,
}

impl Outcome {
    pub(super) fn code(&self) -> u8 {
        match &self.result {
            Ok(report) => code_of(report.verdict),
            Err(failure) => failure.code(),
        }
    }

    fn word(&self) -> &'static str {
        self.result.as_ref().map_or("no verdict", |report| report.verdict.name())
    }
}

/// For people. A failure is told on standard error.
pub(super) fn text(outcome: &Outcome) -> String {
    let mut out = format!("replica    {}\n", outcome.location);
    // Writing to a text can't fail.
    let mut line = |word: &str, rest: &str| writeln!(out, "{word:<10} {rest}").unwrap_or(());
    line("verdict", outcome.word());
    let Ok(report) = &outcome.result else { return out };
    if let Some(newest) = &report.newest {
        let time = format_time(newest.time_ms);
        line("newest", &format!("transaction {} of epoch {}, {time}", newest.txid, newest.epoch));
    }
    for check in &report.checks {
        line("checked", &told(check));
    }
    for finding in &report.findings {
        line(finding.verdict.name(), &finding.sentence);
    }
    for note in &report.notes {
        line("note:", note);
    }
    for what in &report.not_reached {
        line("not reached:", what);
    }
    let cost = cost(report.requests, report.received_bytes, report.seconds);
    line("took", &format!("{cost}; --seed {} makes the same choices", report.seed));
    out
}

fn told(check: &Check) -> String {
    let count = match check.checked == check.of {
        true => format!("{} {}", check.checked, check.unit),
        false => format!("{} of {} {}", check.checked, check.of, check.unit),
    };
    let cost = match check.requests {
        0 => String::new(),
        _ => format!("; {}", cost(check.requests, check.received_bytes, check.seconds)),
    };
    // What is one of its kind says all with its name.
    let is_one = matches!(check.unit, "states" | "databases");
    if check.of == 0 || is_one { format!("{}{cost}", check.name) } else { format!("{}: {count}{cost}", check.name) }
}

fn cost(requests: u64, bytes: u64, seconds: f64) -> String {
    format!("{requests} requests, {bytes} bytes read, {seconds:.2} s")
}

/// One object on a line.
pub(super) fn json(outcome: &Outcome) -> Result<String, Failure> {
    let value = match &outcome.result {
        Ok(report) => serde_json::to_value(report),
        Err(failure) => {
            let (error, code) = (failure.message(), failure.code());
            Ok(json!({ "location": outcome.location, "verdict": null, "error": error, "exit_code": code }))
        }
    };
    let value = value.map_err(|error| Failure::other(format!("the report can't be written: {error}")))?;
    Ok(format!("{value}\n"))
}

/// One document for all replicas: a suite each, a test case for each check.
pub(super) fn junit(outcomes: &[Outcome]) -> String {
    let mut out = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites name=\"waltrail verify\">\n".to_owned();
    for outcome in outcomes {
        match &outcome.result {
            Ok(report) => suite(&mut out, &outcome.location, report),
            Err(failure) => broken_suite(&mut out, &outcome.location, failure),
        }
    }
    out.push_str("</testsuites>\n");
    out
}

fn suite(out: &mut String, location: &str, report: &Report) {
    let cases = cases(report);
    let failures = cases.iter().filter(|case| !case.findings.is_empty()).count();
    let (tests, skipped) = (cases.len() + report.not_reached.len(), report.not_reached.len());
    let name = escaped(location);
    out.push_str(&format!(
        "  <testsuite name=\"{name}\" tests=\"{tests}\" failures=\"{failures}\" errors=\"0\" skipped=\"{skipped}\" \
         time=\"{:.3}\">\n",
        report.seconds
    ));
    for case in &cases {
        let (check, seconds) = (escaped(case.name), case.seconds);
        out.push_str(&format!("    <testcase classname=\"{name}\" name=\"{check}\" time=\"{seconds:.3}\">\n"));
        if let Some(gravest) = case.findings.iter().map(|finding| finding.verdict).max() {
            let sentences: Vec<String> = case
                .findings
                .iter()
                .map(|finding| format!("{}: {}", finding.verdict.name(), finding.sentence))
                .collect();
            let (kind, first) = (gravest.name(), escaped(&case.findings[0].sentence));
            let all = escaped(&sentences.join("\n"));
            out.push_str(&format!("      <failure type=\"{kind}\" message=\"{first}\">{all}</failure>\n"));
        }
        out.push_str("    </testcase>\n");
    }
    for what in &report.not_reached {
        let what = escaped(what);
        out.push_str(&format!(
            "    <testcase classname=\"{name}\" name=\"{what}\"><skipped message=\"not reached\"/></testcase>\n"
        ));
    }
    if !report.notes.is_empty() {
        out.push_str(&format!("    <system-out>{}</system-out>\n", escaped(&report.notes.join("\n"))));
    }
    out.push_str("  </testsuite>\n");
}

fn broken_suite(out: &mut String, location: &str, failure: &Failure) {
    let (name, message) = (escaped(location), escaped(failure.message()));
    out.push_str(&format!(
        "  <testsuite name=\"{name}\" tests=\"1\" failures=\"0\" errors=\"1\" skipped=\"0\">\n    \
         <testcase classname=\"{name}\" name=\"verify\"><error type=\"exit code {}\" message=\"{message}\"/></testcase>\n  \
         </testsuite>\n",
        failure.code()
    ));
}

/// A check and what it found.
struct Case<'a> {
    name: &'a str,
    seconds: f64,
    findings: Vec<&'a Finding>,
}

/// Each check once, also one that ended with a finding before it was counted.
fn cases(report: &Report) -> Vec<Case<'_>> {
    let counted = report.checks.iter().map(|check| (check.name.as_str(), check.seconds));
    let found = report.findings.iter().map(|finding| (finding.check.as_str(), 0.0));
    let mut cases: Vec<Case<'_>> = Vec::new();
    for (name, seconds) in counted.chain(found) {
        if cases.iter().all(|case| case.name != name) {
            cases.push(Case { name, seconds, findings: report.findings_of(name).collect() });
        }
    }
    cases
}

/// Text as XML has it, in an element or an attribute. What XML has no place for is replaced.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            '\n' => out.push_str("&#10;"),
            '\t' => out.push_str("&#9;"),
            '\u{0}'..='\u{1f}' | '\u{7f}'..='\u{9f}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            other => out.push(other),
        }
    }
    out
}

/// A table with a line each, and what was found.
pub(super) fn markdown(outcomes: &[Outcome]) -> String {
    let mut out = "### waltrail verify\n\n| replica | verdict | newest transaction |\n| --- | --- | --- |\n".to_owned();
    for outcome in outcomes {
        let newest = outcome.result.as_ref().ok().and_then(|report| report.newest);
        let newest = newest.map_or("—".into(), |newest| format!("{}, {}", newest.txid, format_time(newest.time_ms)));
        out.push_str(&format!("| {} | {} | {newest} |\n", cell(&outcome.location), outcome.word()));
    }
    out.push('\n');
    for outcome in outcomes {
        match &outcome.result {
            Ok(report) => {
                let is_one_of_many = outcomes.len() > 1;
                for finding in &report.findings {
                    let place = if is_one_of_many { format!("{}: ", cell(&outcome.location)) } else { String::new() };
                    out.push_str(&format!("- {place}**{}** {}\n", finding.verdict.name(), cell(&finding.sentence)));
                }
                for what in &report.not_reached {
                    out.push_str(&format!("- not reached: {}\n", cell(what)));
                }
            }
            Err(failure) => out.push_str(&format!("- {}: {}\n", cell(&outcome.location), cell(failure.message()))),
        }
    }
    let is_sound = |outcome: &Outcome| outcome.result.as_ref().is_ok_and(|report| report.verdict == Verdict::Ok);
    if outcomes.iter().all(is_sound) {
        out.push_str("Everything that was checked is as it should be.\n");
    }
    out.push('\n');
    out
}

/// Text that breaks neither a table nor a line, and is no markup.
fn cell(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' | '\r' => out.push(' '),
            '|' | '`' | '*' | '_' | '<' | '[' | '\\' => out.extend(['\\', character]),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        assert_eq!(escaped("a<b> & \"c\" 'd'\n\u{1}"), "a&lt;b&gt; &amp; &quot;c&quot; &apos;d&apos;&#10;\u{fffd}");
        assert_eq!(cell("a|b\nc_d"), "a\\|b c\\_d");
    }
}
