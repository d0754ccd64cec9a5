//! Devices: list the caller's, end one, remember this one; an administrator sees and ends those of
//! anybody.

use actix_web::{HttpResponse, web};
use chrono::{DateTime, Utc};
use serde::Serialize;

use super::app::App;
use super::caller::Caller;
use super::jobs::at_position;
use super::json::{Fields, FromFields, Json};
use super::lists::{PageAnswer, PageQuery};
use super::problem::{Code, Problem};
use super::{admin, answer};
use crate::domain::ids::{SessionId, UserId};
use crate::domain::session::{Command, EndReason};
use crate::views::{SessionCursor, SessionRow, View};

/// `GET sessions`
pub async fn list(
    app: web::Data<App>,
    caller: Caller,
    page: PageQuery<SessionCursor>,
) -> Result<HttpResponse, Problem> {
    listed(&app, &caller, &caller.user_id, &page)
}

fn listed(
    app: &App,
    caller: &Caller,
    user_id: &UserId,
    page: &PageQuery<SessionCursor>,
) -> Result<HttpResponse, Problem> {
    let found = app.system.views.sessions_of(user_id, page.cursor.as_ref(), page.limit)?;
    let items: Vec<_> = found.items.iter().map(|row| shown(row, caller)).collect();
    Ok(answer::ok(PageAnswer { items, next_cursor: found.next_cursor }))
}

/// `DELETE sessions/{id}`
pub async fn revoke(
    app: web::Data<App>,
    caller: Caller,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    let id = session_of(&app, &caller.user_id, id.into_inner())?;
    end(&app, &caller, &id, EndReason::Revoked).await
}

/// `GET admin/users/{id}/sessions`
pub async fn list_of_user(
    app: web::Data<App>,
    caller: Caller,
    id: web::Path<String>,
    page: PageQuery<SessionCursor>,
) -> Result<HttpResponse, Problem> {
    let user = admin::known(&app, &admin::parse_id(&id)?)?;
    listed(&app, &caller, &user.user_id, &page)
}

/// `DELETE admin/users/{id}/sessions/{session_id}`
pub async fn revoke_of_user(
    app: web::Data<App>,
    caller: Caller,
    ids: web::Path<(String, String)>,
) -> Result<HttpResponse, Problem> {
    let (user_id, id) = ids.into_inner();
    let id = session_of(&app, &admin::parse_id(&user_id)?, id)?;
    end(&app, &caller, &id, EndReason::Revoked).await
}

/// The id, if it is that of a session of this user.
fn session_of(app: &App, user_id: &UserId, id: String) -> Result<SessionId, Problem> {
    let not_found = || Problem::new(Code::NotFound);
    let id = SessionId::try_from(id).map_err(|_| not_found())?;
    let row = app.system.views.session(&id)?.ok_or_else(not_found)?;
    if row.user_id.as_ref() == Some(user_id) { Ok(id) } else { Err(not_found()) }
}

/// `DELETE sessions/current`
pub async fn revoke_current(app: web::Data<App>, caller: Caller) -> Result<HttpResponse, Problem> {
    let id = caller.session_id.as_ref().ok_or_else(|| Problem::new(Code::NotFound))?;
    end(&app, &caller, id, EndReason::SignedOut).await
}

async fn end(
    app: &App,
    caller: &Caller,
    id: &SessionId,
    reason: EndReason,
) -> Result<HttpResponse, Problem> {
    let done = app.system.sessions.execute(id, Command::End { reason }, caller.origin()).await?;
    app.system.visible_in(View::Sessions, done.position).await?;
    let ended = SessionEnded { session_id: id.to_string(), status: "ended" };
    Ok(at_position(answer::ok(ended), done.position))
}

/// The answer when a session was ended.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct SessionEnded {
    pub session_id: String,
    /// `ended`.
    pub status: &'static str,
}

/// The body of `PATCH sessions/current`.
#[derive(Debug, utoipa::ToSchema)]
pub struct Remember {
    pub remember_me: bool,
}

impl FromFields for Remember {
    fn from_fields(fields: &mut Fields) -> Self {
        fields.alias("rememberMe", "remember_me");
        Self { remember_me: fields.bool("remember_me") }
    }
}

/// `PATCH sessions/current`
pub async fn remember(
    app: web::Data<App>,
    caller: Caller,
    body: Json<Remember>,
) -> Result<HttpResponse, Problem> {
    change_current(&app, &caller, Command::Remember { remember_me: body.0.remember_me }).await
}

/// `POST sessions/current/activity`
pub async fn touch(app: web::Data<App>, caller: Caller) -> Result<HttpResponse, Problem> {
    change_current(&app, &caller, Command::Touch).await
}

async fn change_current(
    app: &App,
    caller: &Caller,
    command: Command,
) -> Result<HttpResponse, Problem> {
    let Some(id) = &caller.session_id else {
        return Err(Problem::new(Code::NotFound).with_sentence("Development mode has no sessions"));
    };
    let done = app.system.sessions.execute(id, command, caller.origin()).await?;
    app.system.visible_in(View::Sessions, done.position).await?;
    let row = app.system.views.session(id)?.ok_or_else(|| Problem::new(Code::NotFound))?;
    Ok(at_position(answer::ok(shown(&row, caller)), done.position))
}

/// A session as its user sees it.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct SessionAnswer {
    pub session_id: String,
    /// Whether it is the one that asks.
    pub current: bool,
    pub started_at: DateTime<Utc>,
    pub expires_at: DateTime<Utc>,
    pub last_active_at: DateTime<Utc>,
    pub remember_me: bool,
    pub ip_address: Option<String>,
    pub user_agent: Option<String>,
}

fn shown(row: &SessionRow, caller: &Caller) -> SessionAnswer {
    SessionAnswer {
        session_id: row.session_id.to_string(),
        current: caller.session_id.as_ref().is_some_and(|id| *id == row.session_id),
        started_at: row.started_at,
        expires_at: row.expires_at,
        last_active_at: row.last_active_at,
        remember_me: row.remembered,
        ip_address: row.ip_address.clone(),
        user_agent: row.user_agent.clone(),
    }
}
