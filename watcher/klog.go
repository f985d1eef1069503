package watcher

import (
	"github.com/go-logr/logr"
	"github.com/go-logr/zapr"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"k8s.io/klog/v2"
)

// RouteKlog sends what client-go logs outside of any context to l. klog's logger belongs to the whole process, so the
// program calls this once, before it starts anything; a library does not.
//
// client-go logs as errors what it retries by itself; here those are warnings.
func RouteKlog(l *zap.Logger) {
	klog.SetLogger(klogLogger(l, zapcore.WarnLevel))
}

// klogLogger writes to l, errors at the level errs at most.
func klogLogger(l *zap.Logger, errs zapcore.Level) logr.Logger {
	l = l.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core { return demoted{Core: c, limit: errs} }))
	return zapr.NewLoggerWithOptions(l, zapr.DPanicOnBugs(false))
}

// demoted lowers entries above a level to that level.
type demoted struct {
	zapcore.Core
	limit zapcore.Level
}

func (d demoted) With(fields []zapcore.Field) zapcore.Core {
	return demoted{Core: d.Core.With(fields), limit: d.limit}
}

func (d demoted) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if e.Level > d.limit {
		e.Level = d.limit
		if !d.Enabled(e.Level) {
			return ce
		}
		// The wrapped core would add itself with an entry that keeps the higher level.
		return ce.AddCore(e, d)
	}
	return d.Core.Check(e, ce)
}

func (d demoted) Write(e zapcore.Entry, fields []zapcore.Field) error {
	e.Level = min(e.Level, d.limit)
	return d.Core.Write(e, fields)
}
