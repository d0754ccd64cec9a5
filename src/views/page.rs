//! Lists, newest first, a page at a time. The cursor names the last item seen, so what is added or
//! removed meanwhile neither shifts nor repeats the rest.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Serialize;

use super::Error;
use super::column::int;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Absent on the last page.
    pub next_cursor: Option<String>,
}

/// Where the page before ended: the position that made its last item. Opaque to clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor(u64);

impl Cursor {
    /// # Errors
    /// [`Error::BadCursor`] for what [`Page::next_cursor`] never was.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| Error::BadCursor)?;
        let key = <[u8; 8]>::try_from(bytes).map_err(|_| Error::BadCursor)?;
        let position = u64::from_be_bytes(key);
        if i64::try_from(position).is_err() {
            return Err(Error::BadCursor);
        }
        Ok(Self(position))
    }

    fn text(self) -> String {
        URL_SAFE_NO_PAD.encode(self.0.to_be_bytes())
    }
}

/// The bound of a query `position < ?`.
pub(super) fn before(cursor: Option<&Cursor>) -> i64 {
    cursor.map_or(i64::MAX, |cursor| int(cursor.0))
}

/// One more than asked for, to see whether there is a next page.
pub(super) fn one_more(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1)
}

impl<T> Page<T> {
    /// `rows`, with their positions, are up to [`one_more`] than `limit`.
    pub(super) fn cut(mut rows: Vec<(u64, T)>, limit: usize) -> Self {
        let more = rows.len() > limit;
        rows.truncate(limit);
        let last = rows.last().map(|(position, _)| Cursor(*position).text());
        Self {
            items: rows.into_iter().map(|(_, item)| item).collect(),
            next_cursor: last.filter(|_| more),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_reads_itself_back_and_nothing_else() {
        for position in [0, 1, 77, i64::MAX as u64] {
            assert_eq!(Cursor::parse(&Cursor(position).text()).unwrap(), Cursor(position));
        }
        let beyond = URL_SAFE_NO_PAD.encode(u64::MAX.to_be_bytes());
        for bad in ["", "a", "AAAA", "!!!!!!!!!!!", "AAAAAAAAAAAA", beyond.as_str()] {
            assert!(matches!(Cursor::parse(bad), Err(Error::BadCursor)), "{bad:?}");
        }
    }
}
