//! A moment of the log, as a command is told it.

use chrono::{DateTime, Utc};

/// In `--at` and `--until`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    Position(u64),
    Time(DateTime<Utc>),
}

/// # Errors
/// In words that follow the flag's name.
pub fn parse(text: &str) -> Result<Point, String> {
    if let Ok(position) = text.parse() {
        return Ok(Point::Position(position));
    }
    let time = DateTime::parse_from_rfc3339(text).map_err(|_| "neither a position nor a time")?;
    Ok(Point::Time(time.to_utc()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_a_position_or_a_time() {
        assert_eq!(parse("7"), Ok(Point::Position(7)));
        assert_eq!(parse("1970-01-01T01:00:00+01:00"), Ok(Point::Time(DateTime::UNIX_EPOCH)));
        assert_eq!(parse("yesterday"), Err("neither a position nor a time".to_owned()));
    }
}
