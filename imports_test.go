// Package usher_test checks what holds for the module as a whole: who may import whom, and that no state is global.
package usher_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "usher.dev/usher"

// rule is for the package of, and for those below it; only, as far as none of these has an only of its own.
type rule struct {
	of string
	// only are the packages beyond the standard library that it may import itself; nil allows all. Of several rules with a
	// list for a package, that of the narrowest tree holds.
	only []string
	// tests are those that its tests may import too.
	tests []string
	// never are those that must not be among its dependencies, however far away.
	never []string
	why   string
}

var rules = []rule{
	{
		of: module + "/lifecycle", only: []string{"go.uber.org/zap", module + "/lifecycle"}, never: []string{"k8s.io", "go.etcd.io"},
		why: "it decides; what it needs of Kubernetes, etcd and the kernel it declares as an interface, and its tests need none of them",
	},
	{
		of: module + "/lifecycle/health", only: []string{"go.uber.org/zap", "google.golang.org/grpc", module + "/lifecycle", module + "/internal/api"},
		why: "it asks applications and answers those who ask, over HTTP and gRPC",
	},
	{
		of: module + "/lifecycle/health/probe", only: []string{"go.uber.org/zap", "google.golang.org/grpc"},
		why: "of all below lifecycle, only the grpc probe needs a client",
	},
	{
		of: module + "/watcher", never: []string{"go.etcd.io", module + "/registry", module + "/drain"},
		why: "it knows Kubernetes only, so that it can be used with another registry",
	},
	{
		of: module + "/watcher", never: []string{"k8s.io/client-go/kubernetes"},
		why: "the clientset of all API groups doubles the agent's binary and its memory",
	},
	{
		of: module + "/registry", never: []string{"k8s.io", module + "/watcher", module + "/drain"},
		why: "it knows etcd only, so that usherctl and other readers stay free of Kubernetes",
	},
	{
		of: module + "/drain", only: []string{"go.uber.org/zap", "golang.org/x/sys/unix", module + "/drain"}, tests: []string{"github.com/prometheus/client_golang"}, never: []string{"k8s.io", "go.etcd.io"},
		why: "waiting for an application to be idle has nothing to do with where it is registered",
	},
	{
		of: module + "/notify", only: []string{"go.uber.org/zap", module + "/internal/api"},
		why: "it tells whoever listens what others decided, and knows nothing of how",
	},
	{
		of: module + "/drain/inflight", only: []string{}, tests: []string{module + "/drain"},
		why: "it is linked into applications, whose dependencies are none of its business",
	},
	{
		of: module + "/drain/inflight/grpcinflight", only: []string{"google.golang.org/grpc", module + "/drain/inflight"},
		why: "it is linked into applications that have gRPC already, and nothing else",
	},
	{
		of: module + "/client", only: []string{module + "/internal/api"}, tests: []string{module + "/client", module + "/notify"},
		why: "applications have it linked in, and nobody's dependencies with it",
	},
	{
		of: module + "/internal/api", only: []string{}, never: []string{module + "/lifecycle"},
		why: "usher-prestop has it linked in",
	},
	{
		of: module + "/cmd/usher-prestop", only: []string{module + "/internal/api", module + "/client"}, tests: []string{module + "/notify"},
		why: "it is copied into applications' images and started for every hook call: it has to be small, and to start in milliseconds",
	},
	{
		of: module + "/cmd/usherctl", never: []string{"k8s.io"},
		why: "it asks etcd alone; an operator needs no kubeconfig for it, and it is to stay small",
	},
	{
		of: module + "/cmd/usher-agent", never: []string{"k8s.io/client-go/kubernetes", "github.com/spf13/cobra"},
		why: "it runs beside every pod: each of these costs memory there",
	},
	{
		of: module, never: []string{module + "/integration", "go.etcd.io/etcd/server", "k8s.io/kubernetes"},
		why: "what only tests and the harness need is in a module of its own, so that it never reaches go.mod",
	},
}

// onlyIn are dependencies that have one place.
var onlyIn = map[string]string{
	"github.com/spf13/cobra": module + "/cmd/usherctl",
}

// pkg is what `go list -json` says of a package.
type pkg struct {
	ImportPath, Dir                             string
	Standard                                    bool
	GoFiles, Imports, TestImports, XTestImports []string
	Error                                       *struct{ Err string }
}

type packages map[string]*pkg

// within says whether path is tree or below it.
func within(path, tree string) bool { return path == tree || strings.HasPrefix(path, tree+"/") }

func (ps packages) own() []*pkg {
	var own []*pkg
	for _, p := range ps {
		if within(p.ImportPath, module) {
			own = append(own, p)
		}
	}
	slices.SortFunc(own, func(a, b *pkg) int { return strings.Compare(a.ImportPath, b.ImportPath) })
	return own
}

// direct are what p and its tests import.
func (p *pkg) direct() []string {
	all := slices.Concat(p.Imports, p.TestImports, p.XTestImports)
	slices.Sort(all)
	return slices.Compact(all)
}

// narrower says whether p has a rule of what it may import that lies within r's packages.
func (p *pkg) narrower(r rule) bool {
	return slices.ContainsFunc(rules, func(n rule) bool {
		return n.only != nil && n.of != r.of && within(n.of, r.of) && within(p.ImportPath, n.of)
	})
}

// standard says whether path is of the standard library. Of what only tests import, the list has no entry.
func (ps packages) standard(path string) bool {
	if p, ok := ps[path]; ok {
		return p.Standard
	}
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".")
}

// chain is the shortest way from p to a package that is banned; nil if there is none.
func (ps packages) chain(p *pkg, banned func(string) bool) []string {
	from := map[string]string{}
	queue := []string{}
	visit := func(by string, imports []string) {
		for _, i := range imports {
			if _, seen := from[i]; !seen && i != p.ImportPath {
				from[i] = by
				queue = append(queue, i)
			}
		}
	}
	visit(p.ImportPath, p.direct())
	for len(queue) > 0 {
		path := queue[0]
		queue = queue[1:]
		if banned(path) {
			way := []string{path}
			for at := from[path]; ; at = from[at] {
				way = append(way, at)
				if at == p.ImportPath {
					slices.Reverse(way)
					return way
				}
			}
		}
		if dep := ps[path]; dep != nil {
			visit(path, dep.Imports)
		}
	}
	return nil
}

// violations are all breaches of the rules, one sentence each.
func (ps packages) violations() []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for _, r := range rules {
		used := false
		for _, p := range ps.own() {
			if !within(p.ImportPath, r.of) {
				continue
			}
			used = true
			for _, i := range p.direct() {
				only := r.only
				if !slices.Contains(p.Imports, i) {
					only = slices.Concat(only, r.tests)
				}
				if r.only != nil && !p.narrower(r) && !ps.standard(i) && !slices.ContainsFunc(only, func(o string) bool { return within(i, o) }) {
					add("%s imports %s, but may import only the standard library and %q: %s", p.ImportPath, i, r.only, r.why)
				}
			}
			for _, never := range r.never {
				if way := ps.chain(p, func(path string) bool { return within(path, never) }); way != nil {
					add("%s must never import %s: %s", strings.Join(way, " -> "), never, r.why)
				}
			}
		}
		if !used {
			add("there is no package %s any more: its rule guards nothing", r.of)
		}
	}
	for _, p := range ps.own() {
		for _, i := range p.direct() {
			// cmd/x may have packages of its own.
			if rest, ok := strings.CutPrefix(i, module+"/cmd/"); ok {
				program, _, _ := strings.Cut(rest, "/")
				if !within(p.ImportPath, module+"/cmd/"+program) {
					add("%s imports %s: a program wires packages together, and is no package itself", p.ImportPath, i)
				}
			}
			for dep, place := range onlyIn {
				if within(i, dep) && !within(p.ImportPath, place) {
					add("%s imports %s, which only %s may", p.ImportPath, i, place)
				}
			}
		}
	}
	return out
}

// list asks the go command for the module's packages and all that they depend on.
func list(t *testing.T) packages {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-json=ImportPath,Dir,Standard,GoFiles,Imports,TestImports,XTestImports,Error", "./...")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdout, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	ps := packages{}
	for d := json.NewDecoder(strings.NewReader(string(stdout))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return ps
		} else if err != nil {
			t.Fatal(err)
		}
		ps[p.ImportPath] = &p
	}
}

func TestImportRules(t *testing.T) {
	for _, v := range list(t).violations() {
		t.Error(v)
	}
}

func TestImportRulesSeeABreach(t *testing.T) {
	for _, tc := range []struct{ of, imports, want string }{
		{"lifecycle", "github.com/x/y", `lifecycle imports github.com/x/y, but may import only the standard library`},
		{"lifecycle", "far", `lifecycle -> far -> k8s.io/api must never import k8s.io`},
		{"lifecycle/health", "far", `lifecycle/health -> far -> k8s.io/api must never import k8s.io`},
		{"lifecycle", "google.golang.org/grpc", `lifecycle imports google.golang.org/grpc, but may import only`},
		{"lifecycle/health", "google.golang.org/grpc", ``},
		{"lifecycle/health", module + "/drain", `lifecycle/health imports usher.dev/usher/drain, but may`},
		{"lifecycle/health/probe", "google.golang.org/grpc/codes", ``},
		{"lifecycle/health/probe", module + "/drain", `lifecycle/health/probe imports usher.dev/usher/drain, but may`},
		{"watcher", module + "/drain", `watcher -> usher.dev/usher/drain must never import usher.dev/usher/drain`},
		{"watcher", "go.etcd.io/etcd/client/v3", `watcher -> go.etcd.io/etcd/client/v3 must never import go.etcd.io`},
		{"registry", module + "/watcher", `registry -> usher.dev/usher/watcher must never`},
		{"registry/format", "k8s.io/api", `registry/format -> k8s.io/api must never`},
		{"drain", module + "/lifecycle", `drain imports usher.dev/usher/lifecycle, but may`},
		{"drain", "github.com/prometheus/client_golang/prometheus", ``}, // of its tests
		{"notify", module + "/lifecycle", `notify imports usher.dev/usher/lifecycle, but may`},
		{"drain/inflight", "go.uber.org/zap", `drain/inflight imports go.uber.org/zap, but may`},
		{"drain/inflight", "google.golang.org/grpc/stats", `drain/inflight imports google.golang.org/grpc/stats, but may`},
		{"drain/inflight/grpcinflight", "google.golang.org/grpc/stats", ``},
		{"drain/inflight/grpcinflight", "go.uber.org/zap", `drain/inflight/grpcinflight imports go.uber.org/zap, but may`},
		{"drain/inflight/grpcinflight", "far", `drain/inflight/grpcinflight -> far -> k8s.io/api must never`},
		{"client", "go.uber.org/zap", `client imports go.uber.org/zap, but may`},
		{"internal/api", "go.uber.org/zap", `internal/api imports go.uber.org/zap, but may`},
		{"cmd/usher-prestop", "go.uber.org/zap", `cmd/usher-prestop imports go.uber.org/zap, but may`},
		{"cmd/usherctl", "far", `cmd/usherctl -> far -> k8s.io/api must never`},
		{"cmd/usher-agent", "k8s.io/client-go/kubernetes/scheme", `cmd/usher-agent -> k8s.io/client-go/kubernetes/scheme must never`},
		{"cmd/usher-agent", "github.com/spf13/cobra", `cmd/usher-agent imports github.com/spf13/cobra, which only usher.dev/usher/cmd/usherctl may`},
		{"registry", "go.etcd.io/etcd/server/v3/embed", `registry -> go.etcd.io/etcd/server/v3/embed must never import go.etcd.io/etcd/server`},
		{"watcher", module + "/cmd/usherctl", `watcher imports usher.dev/usher/cmd/usherctl: a program`},
		{"cmd/usherctl", module + "/cmd/usherctl/x", ``},
		{"drain", "k8s.iot/x", `may import only`}, // a prefix by segments, not by letters
	} {
		ps := packages{"far": {ImportPath: "far", Imports: []string{"k8s.io/api"}}}
		for _, r := range rules {
			ps[r.of] = &pkg{ImportPath: r.of}
		}
		if v := ps.violations(); len(v) > 0 {
			t.Fatalf("nobody imports anything, and yet: %q", v)
		}
		of := module + "/" + tc.of
		ps[of] = &pkg{ImportPath: of, TestImports: []string{tc.imports}}
		v := ps.violations()
		if tc.want == "" && len(v) > 0 || tc.want != "" && !slices.ContainsFunc(v, func(s string) bool { return strings.Contains(s, tc.want) }) {
			t.Errorf("%s imports %s: got %q, want %q", tc.of, tc.imports, v, tc.want)
		}
	}
	ps := packages{}
	for _, r := range rules {
		ps[r.of] = &pkg{ImportPath: r.of}
	}
	ps[module+"/drain"].Imports = []string{"github.com/prometheus/client_golang/prometheus"}
	if v := ps.violations(); len(v) != 1 || !strings.Contains(v[0], `drain imports github.com/prometheus/client_golang/prometheus, but may`) {
		t.Errorf("what tests may import is imported by what is not one: got %q", v)
	}
	if v := (packages{}).violations(); len(v) != len(rules) {
		t.Errorf("rules for packages that don't exist: %q", v)
	}
}

// TestAgentKeepsOnlyMethodsInUse: reflect's MethodByName and Method, called with what only the run knows, make the linker
// keep every exported method of every type, 4 MB in each sidecar. Packages don't tell: what is imported need not be linked.
// text/template does it; so does golang.org/x/net/trace, hence the tag, with which the agent is to be built.
func TestAgentKeepsOnlyMethodsInUse(t *testing.T) {
	for _, r := range reflectsMethods(t, "-tags=grpcnotrace", "./cmd/usher-agent") {
		t.Errorf("%s looks methods up as the program runs", r)
	}
}

func TestReflectedMethodsAreSeen(t *testing.T) {
	source := filepath.Join(t.TempDir(), "main.go")
	text := `package main; import ("os"; "text/template"); func main() { template.New("").Execute(os.Stdout, nil) }`
	if err := os.WriteFile(source, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := reflectsMethods(t, source); !slices.Contains(got, "text/template.(*state).evalField") {
		t.Errorf("got %q, want text/template's", got)
	}
}

// reflectsMethods are the functions linked into a program that look methods up by a name or number not known before it
// runs. The linker marks them in the dependencies that it lists, one a line: from [<mark>...] -> to [<mark>...].
func reflectsMethods(t *testing.T, build ...string) []string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"build", "-ldflags=-dumpdep", "-o", filepath.Join(t.TempDir(), "program")}, build...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	listed, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("go build: %v\n%.2000s", err, listed)
	}
	var found []string
	main := false
	for line := range strings.Lines(string(listed)) {
		from, _, _ := strings.Cut(line, " -> ")
		main = main || strings.HasPrefix(from, "main.main")
		if name, marks, _ := strings.Cut(from, " <"); strings.Contains(marks, "ReflectMethod>") && !slices.Contains(found, name) {
			found = append(found, name)
		}
	}
	if !main {
		t.Fatalf("the linker listed no dependency of main.main: %.2000s", listed)
	}
	return found
}

// TestNoGlobalState finds init functions, and package-level variables that are given a value after their declaration or
// are of a type that exists to be changed (sync, sync/atomic). What other methods do can't be seen this way.
func TestNoGlobalState(t *testing.T) {
	for _, p := range list(t).own() {
		sources := map[string]any{}
		for _, f := range p.GoFiles {
			sources[filepath.Join(p.Dir, f)] = nil // nil: parser reads the file
		}
		for _, v := range globalState(t, p.ImportPath, sources) {
			t.Error(v.text)
		}
	}
}

func TestGlobalStateIsSeen(t *testing.T) {
	for source, want := range map[string]string{
		`func init() {}`:                                         "init",
		`var x int; func f() { x = 1 }`:                          "x",
		`var x int; func f() { x++ }`:                            "x",
		`var x []int; func f() { x[0] += 1 }`:                    "x",
		`var x struct{ y *int }; func f() { *x.y = 1 }`:          "x",
		`var x int; func f() *int { return &x }`:                 "x",
		`var x int; func f() { for x = range 3 {} }`:             "x",
		`var x map[int]int; func f() { delete(x, 1) }`:           "x",
		`import "sync"; var x, y sync.Mutex`:                     "x",
		`import "sync/atomic"; var x atomic.Int64`:               "x",
		`import "errors"; var x = errors.New("x")`:               "",
		`var x = []string{"a"}; func f() string { return x[0] }`: "",
		`var x int; func f() { x := 2; x = 1; _ = x }`:           "",
		`type t struct{}; func (t) init() {}`:                    "",
	} {
		got := globalState(t, "p", map[string]any{"x.go": "package p; " + source})
		if want == "" && len(got) > 0 || want != "" && (len(got) != 1 || got[0].name != want) {
			t.Errorf("%s: got %+v, want %q", source, got, want)
		}
	}
}

// global is a thing that there should not be.
type global struct{ name, text string }

func globalState(t *testing.T, path string, sources map[string]any) []global {
	t.Helper()
	var out []global
	fset := token.NewFileSet()
	found := func(at ast.Node, name, what string) {
		out = append(out, global{name, fmt.Sprintf("%s: %s %s: no state is global", fset.Position(at.Pos()), name, what)})
	}
	var files []*ast.File
	for name, source := range sources {
		f, err := parser.ParseFile(fset, name, source, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	// Imports don't resolve here and needn't: the question is only which names are the package's own variables.
	cfg := types.Config{Error: func(error) {}}
	tpkg, _ := cfg.Check(path, fset, files, info)

	reported := map[types.Object]bool{}
	// changed reports the variable that an assignment to e changes.
	changed := func(e ast.Expr) {
		for {
			switch x := e.(type) {
			case *ast.IndexExpr:
				e = x.X
			case *ast.SelectorExpr:
				e = x.X
			case *ast.StarExpr:
				e = x.X
			case *ast.ParenExpr:
				e = x.X
			case *ast.Ident:
				v, ok := info.Uses[x].(*types.Var)
				if ok && v.Parent() == tpkg.Scope() && !reported[v] {
					reported[v] = true
					found(x, x.Name, "is package-level, and changed")
				}
				return
			default:
				return
			}
		}
	}
	for _, f := range files {
		for _, d := range f.Decls {
			d, ok := d.(*ast.GenDecl)
			if !ok || d.Tok != token.VAR {
				continue
			}
			for _, spec := range d.Specs {
				spec := spec.(*ast.ValueSpec)
				if t, ok := spec.Type.(*ast.SelectorExpr); ok {
					if of, ok := t.X.(*ast.Ident); ok && (of.Name == "sync" || of.Name == "atomic") {
						found(spec, spec.Names[0].Name, "is package-level, and made to be changed")
					}
				}
			}
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if n.Recv == nil && n.Name.Name == "init" {
					found(n, "init", "runs before main")
				}
			case *ast.AssignStmt:
				if n.Tok != token.DEFINE {
					for _, e := range n.Lhs {
						changed(e)
					}
				}
			case *ast.IncDecStmt:
				changed(n.X)
			case *ast.RangeStmt:
				if n.Tok == token.ASSIGN {
					changed(n.Key)
					changed(n.Value)
				}
			case *ast.UnaryExpr:
				if n.Op == token.AND {
					changed(n.X)
				}
			case *ast.CallExpr:
				if fun, ok := n.Fun.(*ast.Ident); ok && (fun.Name == "delete" || fun.Name == "clear") && len(n.Args) > 0 {
					changed(n.Args[0])
				}
			}
			return true
		})
	}
	return out
}
