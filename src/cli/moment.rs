//! Times and transaction numbers as people write them.

use jiff::civil::{DateTime, Time};
use jiff::{Span, SpanRelativeTo, Timestamp, Zoned, tz::TimeZone};

/// Reads a time: RFC 3339 (`2026-03-01T14:00:00.5Z`, `…+02:00`), with a zone (`2026-03-01T14:00[Europe/Berlin]`),
/// `2026-03-01 14:00` or `yesterday 14:00` in `zone`, or `10 minutes ago`. Returns milliseconds since 1970.
///
/// # Errors
/// A sentence with examples.
pub fn parse_moment(text: &str, now_ms: u64, zone: &TimeZone) -> Result<u64, String> {
    let text = text.trim();
    let parsed = match text.strip_suffix("ago") {
        Some(span) => ago(span, now_ms),
        None => {
            of_day(text, now_ms, zone).or_else(|| timestamp(text, zone)).map(|timestamp| timestamp.as_millisecond())
        }
    };
    parsed.and_then(|ms| u64::try_from(ms).ok()).ok_or_else(|| {
        format!(
            "'{text}' is not a time; write 2026-03-01T14:00:00Z, '2026-03-01 14:00' (UTC, or as --tz says), 'yesterday 14:00', or \
             '10 minutes ago'"
        )
    })
}

/// Reads a time zone by its name; `local` is the machine's.
///
/// # Errors
/// A sentence with examples.
pub fn parse_zone(name: &str) -> Result<TimeZone, String> {
    let zone = if name == "local" { TimeZone::try_system() } else { TimeZone::get(name) };
    zone.map_err(|_| {
        format!("this machine knows no time zone '{name}'; write UTC, local, or a name like Europe/Berlin")
    })
}

/// `today 14:00`, `yesterday 14:00:05`.
fn of_day(text: &str, now_ms: u64, zone: &TimeZone) -> Option<Timestamp> {
    let (day, time) = text.split_once(' ')?;
    let days_before = match day {
        "today" => 0,
        "yesterday" => 1,
        _ => return None,
    };
    let now = Timestamp::from_millisecond(i64::try_from(now_ms).ok()?).ok()?.to_zoned(zone.clone());
    let date = now.date().checked_sub(Span::new().days(days_before)).ok()?;
    let time: Time = time.trim().parse().ok()?;
    Some(date.to_datetime(time).to_zoned(zone.clone()).ok()?.timestamp())
}

fn timestamp(text: &str, zone: &TimeZone) -> Option<Timestamp> {
    // Only this reader heeds a zone's name; the others pass over it, and would be hours off.
    if text.contains('[') {
        return text.parse::<Zoned>().ok().map(|zoned| zoned.timestamp());
    }
    let in_zone = || text.parse::<DateTime>().ok()?.to_zoned(zone.clone()).ok().map(|zoned| zoned.timestamp());
    text.parse().ok().or_else(in_zone)
}

/// A day is 24 hours and a week seven of them; how long a month is, nobody can say.
fn ago(span: &str, now_ms: u64) -> Option<i64> {
    let span: Span = span.strip_suffix(char::is_whitespace)?.trim().parse().ok()?;
    let before_ms = span.to_duration(SpanRelativeTo::days_are_24_hours()).ok()?.as_millis();
    // "10 minutes ago ago" is none.
    let before_ms = i64::try_from(before_ms).ok().filter(|ms| *ms >= 0)?;
    i64::try_from(now_ms).ok()?.checked_sub(before_ms)
}

/// Reads a transaction number: decimal, or hexadecimal as 16 digits or after `0x`, as object names have it.
///
/// # Errors
/// A sentence with examples.
pub fn parse_txid(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hexadecimal) => u64::from_str_radix(hexadecimal, 16),
        None if text.len() == 16 => u64::from_str_radix(text, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("'{text}' is not a transaction number; write 1234, 0x4d2 or 00000000000004d2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments() {
        let now = 1_800_000_000_000;
        for (text, ms) in [
            ("2026-03-01T14:00:00Z", 1_772_373_600_000),
            ("2026-03-01T14:00:00.123Z", 1_772_373_600_123),
            ("2026-03-01T16:00:00+02:00", 1_772_373_600_000),
            ("2026-03-01 14:00", 1_772_373_600_000),
            ("2026-03-01 14:00:05", 1_772_373_605_000),
            ("10 minutes ago", now - 600_000),
            ("90s ago", now - 90_000),
            ("1h 30m ago", now - 5_400_000),
            ("2 days ago", now - 172_800_000),
            ("1 week ago", now - 604_800_000),
            ("2026-03-01T15:00[+01:00]", 1_772_373_600_000),
            ("2026-03-01T15:00:00+01:00[+01:00]", 1_772_373_600_000),
            ("2026-03-01 15:00+01", 1_772_373_600_000),
            // Now is 2027-01-15 08:00.
            ("today 07:00", now - 3_600_000),
            ("yesterday 07:00", now - 90_000_000),
            ("yesterday 07:00:30", now - 90_000_000 + 30_000),
        ] {
            assert_eq!(parse_moment(text, now, &TimeZone::UTC), Ok(ms), "{text}");
        }
        for wrong in [
            "",
            "yesterday",
            "10 minutes",
            "ago",
            "1960-01-01T00:00:00Z",
            "14:00",
            "10 minutes ago ago",
            "-10 minutes ago",
            "1 month ago",
            "10 minutesago",
            "2026-03-01T14:00[Europe/Nowhere]",
            "2026-03-01T14:00:00+05:00[+01:00]",
            "2026-02-30 14:00",
        ] {
            assert!(parse_moment(wrong, now, &TimeZone::UTC).is_err(), "{wrong}");
        }
        // A machine may know no zones: then it is an error, but never UTC.
        let berlin = parse_moment("2026-03-01T15:00:00[Europe/Berlin]", now, &TimeZone::UTC);
        assert!(berlin.is_err() || berlin == Ok(1_772_373_600_000), "{berlin:?}");
        let east = TimeZone::fixed(jiff::tz::offset(2));
        assert_eq!(parse_moment("2026-03-01 16:00", now, &east), Ok(1_772_373_600_000));
        assert_eq!(parse_moment("2026-03-01T14:00:00Z", now, &east), Ok(1_772_373_600_000), "it names its own");
        assert_eq!(parse_moment("today 09:00", now, &east), Ok(now - 3_600_000));
        assert!(parse_zone("Europe/Nowhere").is_err() && parse_zone("UTC").is_ok());
        assert_eq!(parse_txid("0x4d2"), Ok(1234));
        assert_eq!(parse_txid("00000000000004d2"), Ok(1234));
        assert!(parse_txid("12x").is_err());
    }
}
