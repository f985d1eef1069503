// Command app is the pod of the cluster's tests. It prints what a pod must be able to do, then answers on port 8080. With a
// URL as its argument it prints the answer from there and ends.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

func main() {
	if len(os.Args) > 1 {
		fmt.Println("answer:", get(http.DefaultTransport, os.Args[1], ""))
		return
	}
	fmt.Println("api:", api())
	fmt.Println("registry:", get(http.DefaultTransport, os.Getenv("REGISTRY")+"/health", ""))
	fmt.Println("user:", os.Getuid())
	fmt.Println("serving:", http.ListenAndServe(":8080", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "hello")
	})))
}

func api() string {
	const account = "/var/run/secrets/kubernetes.io/serviceaccount/"
	token, err := os.ReadFile(account + "token")
	if err != nil {
		return err.Error()
	}
	ca, err := os.ReadFile(account + "ca.crt")
	if err != nil {
		return err.Error()
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	host := net.JoinHostPort(os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT"))
	return get(&http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}, "https://"+host+"/version", string(token))
}

func get(transport http.RoundTripper, url, token string) string {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return err.Error()
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := (&http.Client{Transport: transport, Timeout: 10 * time.Second}).Do(req)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%d %s", resp.StatusCode, body)
}
